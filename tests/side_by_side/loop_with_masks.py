"""A user's training script for spidr 0.1.2: boolean masks, distributed training on CPUs.

    torchrun … loop_with_masks.py FOLDER STEPS     # or python, for one process

Trains a small SpidR on FOLDER, or resumes, up to STEPS steps, and appends a line of measurements per step to
FOLDER/losses.jsonl. Data, initial weights and masks do not depend on the package, so that packages can be compared.
"""

import sys
from dataclasses import replace
from pathlib import Path

import setting
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from spidr.checkpoint import Checkpointer
from spidr.config import read_config
from spidr.data import build_dataloader
from spidr.models import build_model
from spidr.optimizer import build_optimizer


def main(folder: Path, steps: int) -> None:
    rank, world_size = setting.join()
    cfg = read_config(setting.prepare(folder, rank))
    cfg = replace(cfg, optimizer=replace(cfg.optimizer, max_steps=steps))
    torch.manual_seed(cfg.run.random_seed + rank)
    model = build_model(cfg=cfg.model, model_type=cfg.run.model_type).train()
    model.load_state_dict(setting.first_weights(model))
    optimizer, scaler, scheduler = build_optimizer(model, cfg.optimizer)
    loader = build_dataloader(cfg.data, cfg.masking, conv_layer_config=cfg.model.extractor_conv_layer_config)
    checkpointer = Checkpointer(cfg.run.dir, cfg.run.save_interval, cfg.run.keep_latest)
    checkpointer.init_state(model, optimizer, scheduler, scaler)
    checkpointer.load_existing_run()
    step, epoch = int(checkpointer.step), int(checkpointer.epoch)
    ddp = DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
    while step < cfg.optimizer.max_steps:
        epoch += 1
        loader.batch_sampler.set_epoch(epoch)
        for waveforms, attention_mask, mask in loader:
            if step >= cfg.optimizer.max_steps:
                break
            assert mask.dtype == torch.bool
            waveforms, mask = setting.same_masks(waveforms, mask, step)
            num_frames = mask.sum()
            dist.all_reduce(num_frames)
            loss, outputs = ddp(waveforms, mask=mask, attention_mask=attention_mask)
            loss = loss.sum() * world_size / num_frames
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            grad_norm = clip_grad_norm_(ddp.parameters(), cfg.optimizer.max_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            lr = scheduler.get_last_lr()[0]
            scheduler.step()
            step += 1
            ema_decay = model.update_ema(step)
            measured = {"grad_norm": grad_norm, "lr": lr, "ema_decay": ema_decay}
            measured |= {name: outputs[name] for name in ("target_ppl", "pred_ppl")}
            setting.log(folder, rank, step, loss, **measured)
            if rank == 0:
                checkpointer.save(step, epoch)
    if rank == 0:
        checkpointer.save_final(step, epoch)
        torch.save(model.state_dict(), folder / "weights.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
