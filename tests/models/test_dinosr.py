"""DinoSR and SpidR in training and inference, beyond the golden values."""

import copy
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.small_models import tiny_model
from helpers.utterances import LENGTHS, num_frames, padded
from spidr.config import DinoSRConfig
from spidr.models import DinoSR, SpidR, dinosr
from spidr.models.codebook import Codebook
from spidr.models.dinosr import ema_scheduler
from spidr.models.metrics import perplexity
from spidr.models.spidr import exp_ema_scheduler
from spidr.tools.errors import InputError

BOTH = pytest.mark.parametrize("model_type", ["spidr", "dinosr"])
NO_DROPOUT = {"encoder_dropout": 0.0, "encoder_attention_dropout": 0.0, "encoder_layer_drop": 0.0}

# ------------------------------------------------------------------------------------------------------------- training


def training_loss(model: DinoSR, waveforms: Tensor, mask: Tensor) -> Tensor:
    """The loss from its definition, by frame and codebook; post-norm, without padding."""
    features, _ = model.project(waveforms)
    targets = model.teacher.get_intermediate_outputs(features)[-model.num_codebooks :]
    masked_input = features.clone()
    masked_input[mask] = model.mask_embedding
    hidden = model.student.get_intermediate_outputs(masked_input)[-model.num_codebooks :]
    if not isinstance(model, SpidR):
        hidden = [model.student(masked_input)] * model.num_codebooks
    losses = []
    for b, t in mask.nonzero().tolist():
        per_codebook = []
        for k, codebook in enumerate(model.codebooks):
            track = targets[k][b]
            target = ((track - track.mean(0)) / torch.sqrt(track.var(0, correction=0) + 1e-5))[t]
            centres = codebook.codebook / codebook.counts.unsqueeze(1)
            label = (centres - target).square().sum(1).argmin()
            per_codebook.append(-model.heads[k](hidden[k][b, t])[label])
        losses.append(torch.stack(per_codebook).mean())
    return torch.stack(losses)


@BOTH
def test_loss_equals_its_definition(model_type: str) -> None:
    model = tiny_model(model_type, **NO_DROPOUT)
    waveforms = torch.randn(2, 1500)
    mask = torch.rand(2, num_frames(model, 1500)) < 0.5
    expected = training_loss(model.train(), waveforms, mask)  # with the codebooks before their update
    loss, _ = model(waveforms, mask=mask)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    loss_of_all, _ = model(waveforms)
    assert loss_of_all.shape == (mask.numel(),)


@BOTH
def test_outputs_have_stated_shapes(model_type: str) -> None:
    model = tiny_model(model_type)
    mask = torch.zeros(2, num_frames(model, 1500), dtype=torch.bool)
    mask[:, 3:8] = True
    loss, outputs = model(torch.randn(2, 1500), mask=mask)
    assert loss.shape == (10,)
    assert outputs["target_ppl"].shape == outputs["pred_ppl"].shape == ()
    assert {tuple(outputs[name].shape) for name in ("target_ppls", "pred_ppls", "active_codewords")} == {(3,)}
    torch.testing.assert_close(outputs["target_ppl"], outputs["target_ppls"].mean())


def test_channel_mask_silences_channels_of_the_students_input() -> None:
    model = tiny_model(**NO_DROPOUT)
    seen: list[Tensor] = []
    model.student.pos_conv_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    channel_mask = torch.rand(2, 32) < 0.3
    model(torch.randn(2, 1500), channel_mask=channel_mask)
    assert not seen[0].transpose(1, 2)[channel_mask].any()
    assert seen[0].transpose(1, 2)[~channel_mask].all()


@BOTH
def test_codebook_statistics_add_up_over_micro_batches(model_type: str) -> None:
    """Two forward passes before ``update_ema`` do what one pass on both does."""
    waveforms = torch.randn(4, 1500)
    models = [tiny_model(model_type, **NO_DROPOUT).train() for _ in range(2)]
    for model in models:
        model.defer_codebook_updates = True
    mask = torch.rand(4, num_frames(models[0], 1500)) < 0.4
    models[0](waveforms, mask=mask)
    for part in (slice(0, 1), slice(1, 4)):
        models[1](waveforms[part], mask=mask[part])
    before = models[0].codebooks[0].codebook.clone()
    for model in models:
        model.update_ema(1)
    assert not torch.equal(models[0].codebooks[0].codebook, before)
    for (name, whole), (_, parts) in zip(*(m.codebooks.named_buffers() for m in models), strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5, msg=name)
    again = models[0].codebooks[0].codebook.clone()
    models[0].update_ema(2)  # nothing has been accumulated since
    assert torch.equal(models[0].codebooks[0].codebook, again)


@BOTH
def test_every_training_forward_moves_the_codebooks(model_type: str) -> None:
    """Fine-tuning with a frozen teacher needs this, as it never calls ``update_ema``."""
    model = tiny_model(model_type, **NO_DROPOUT).train()
    deferred = copy.deepcopy(model)
    deferred.defer_codebook_updates = True
    deferred.ema_scheduler = lambda step: 1.0  # the teacher stays
    mask = torch.rand(2, num_frames(model, 1500)) < 0.5
    for step in (1, 2, 3):
        waveforms, before = torch.randn(2, 1500), model.codebooks[0].codebook.clone()
        loss, outputs = model(waveforms, mask=mask)
        assert not torch.equal(model.codebooks[0].codebook, before)
        loss_again, outputs_again = deferred(waveforms, mask=mask)
        assert torch.equal(deferred.codebooks[0].codebook, before)
        torch.testing.assert_close((loss_again, outputs_again), (loss, outputs))
        deferred.update_ema(step)
        for (name, one), (_, other) in zip(*(m.codebooks.named_buffers() for m in (model, deferred)), strict=True):
            torch.testing.assert_close(one, other, msg=name)


def test_a_codebook_on_its_own_updates_itself_in_training() -> None:
    codebook, frames = Codebook(4, 6, 0.9), torch.randn(50, 4)
    before = codebook.codebook.clone()
    one_hot = codebook.eval()(frames)
    assert one_hot.shape == (50, 6)
    assert torch.equal(one_hot.sum(1), torch.ones(50))
    assert torch.equal(codebook.codebook, before)
    assert torch.equal(codebook.train()(frames), one_hot)
    used = one_hot.sum(0) > 0
    expected = torch.where(used.unsqueeze(1), 0.9 * before + 0.1 * one_hot.T @ frames, before)
    torch.testing.assert_close(codebook.codebook, expected)


def test_either_kind_of_mask_under_either_name() -> None:
    dinosr._warn_of_boolean_indices.cache_clear()  # another test may have triggered the warning
    model, waveforms = tiny_model(**NO_DROPOUT), torch.randn(2, 1500)
    frames = num_frames(model, 1500)
    indices = torch.stack([torch.randperm(frames)[:7].sort().values for _ in range(2)])
    mask = torch.zeros(2, frames, dtype=torch.bool).scatter_(1, indices, value=True)
    model.eval()
    losses = [
        model(waveforms, mask=mask)[0],
        model(waveforms, mask=indices)[0],
        model(waveforms, mask_indices=indices)[0],
    ]
    with pytest.warns(UserWarning, match=r"count masked frames with `mask\.sum\(\)`, not `numel\(\)`"):
        losses.append(model(waveforms, mask_indices=mask)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(waveforms, mask_indices=mask)  # it warns once
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    with pytest.raises(InputError, match="two names of one argument"):
        model(waveforms, mask=mask, mask_indices=indices)


def test_no_update_of_codebooks_with_a_decay_of_one_nor_in_eval_mode() -> None:
    for model in (tiny_model(codebook_decay=1.0).train(), tiny_model().eval()):
        before = [b.clone() for b in model.codebooks.buffers()]
        model(torch.randn(2, 1500))
        model.update_ema(1)
        assert all(torch.equal(a, b) for a, b in zip(before, model.codebooks.buffers(), strict=True))


def test_one_reduction_sums_all_statistics_of_a_step() -> None:
    single, double = (tiny_model(**NO_DROPOUT).train() for _ in range(2))
    single.defer_codebook_updates = double.defer_codebook_updates = True
    calls: list[int] = []

    def twice(x: Tensor) -> None:  # as if two processes had seen the same batch
        calls.append(x.numel())
        x.mul_(2)

    double.reduction = twice
    waveforms = torch.randn(2, 1500)
    for model in (single, double):
        model(waveforms)
    assert calls == []  # given a reduction, forward passes leave the perplexities to the caller
    assigned = 2 * single.reduce_statistics()["assigned"]
    assert torch.equal(double.reduce_statistics()["assigned"], assigned)
    double.update_ema(1)
    assert calls == [double.statistics.flat.numel()]
    for codebook, count in zip(double.codebooks, assigned, strict=True):
        expected = torch.where(count > 0, 0.9 + 0.1 * count, torch.ones(12))
        torch.testing.assert_close(codebook.counts, expected)


def test_statistics_stay_float32_under_autocast() -> None:
    model = tiny_model(**NO_DROPOUT).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss, outputs = model(torch.randn(2, 1500))
    assert loss.dtype == outputs["target_ppl"].dtype == torch.float32
    loss.mean().backward()
    model.update_ema(1)
    assert all(b.dtype == torch.float32 for name, b in model.codebooks.named_buffers() if not name.endswith("idle"))


# -------------------------------------------------------------------------------------------------------------- teacher


def test_teacher_follows_the_student() -> None:
    model = tiny_model().train()
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.normal_()
    before = {name: p.clone() for name, p in model.teacher.named_parameters()}
    decay = model.update_ema(5)
    assert decay == exp_ema_scheduler(5, 0.999, 20_000, 1e-7)
    student = dict(model.student.named_parameters())
    for name, parameter in model.teacher.named_parameters():
        if name.startswith("pos_conv_embed"):
            assert torch.equal(parameter, student[name])
        else:
            torch.testing.assert_close(parameter, decay * before[name] + (1 - decay) * student[name])
    assert model.current_step.item() == 5


@pytest.mark.parametrize("excluded", [[], ["pos_conv_embed", "layers", "layer_norm"]], ids=["nothing", "everything"])
def test_averages_or_copies_the_whole_teacher(excluded: list[str]) -> None:
    model = tiny_model(ema_exclude_layers=excluded).train()
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.normal_()
    before = [p.clone() for p in model.teacher.parameters()]
    decay = 0.0 if excluded else exp_ema_scheduler(1, 0.999, 20_000, 1e-7)
    model.update_ema(1)
    for teacher, old, student in zip(model.teacher.parameters(), before, model.student.parameters(), strict=True):
        torch.testing.assert_close(teacher, decay * old + (1 - decay) * student)


def test_teacher_starts_from_its_own_random_weights() -> None:
    model = tiny_model()
    assert not torch.equal(model.teacher.layers[0].attention.qkv.weight, model.student.layers[0].attention.qkv.weight)
    for teacher, student in zip(
        model.teacher.pos_conv_embed.parameters(), model.student.pos_conv_embed.parameters(), strict=True
    ):
        assert torch.equal(teacher, student)
    assert not any(p.requires_grad for p in model.teacher.parameters())


@BOTH
def test_teacher_is_never_in_training_mode(model_type: str) -> None:
    model = tiny_model(model_type)
    assert not model.train().teacher.training
    assert model.student.training
    assert not model.eval().student.training


def test_no_update_at_all_outside_the_open_interval() -> None:
    model = tiny_model("dinosr", freeze_step=3, ema_final_step=2).train()
    with torch.no_grad():
        model.student.pos_conv_embed.convs[0].bias.fill_(3.0)
    before = [p.clone() for p in model.teacher.parameters()]
    assert model.update_ema(3) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.teacher.parameters(), strict=True))


def test_ema_schedules() -> None:
    dinosr = [ema_scheduler(t, 0.9, 0.99, 10, 20) for t in (0, 5, 10, 19, 20, 21)]
    assert dinosr == pytest.approx([0.9, 0.945, 0.99, 0.99, 1.0, 1.0])
    late = [ema_scheduler(t, 0.9, 0.99, 10, 4) for t in (4, 9, 10, 11)]  # rises to its final value first
    assert late == pytest.approx([0.936, 0.981, 1.0, 1.0])
    assert exp_ema_scheduler(0, 0.999, 100, 1e-7) == pytest.approx(0.999)
    assert exp_ema_scheduler(100, 0.999, 100, 1e-7) == pytest.approx(1 - 0.001 / math.e)
    threshold = math.ceil(100 * math.log(0.001 / 1e-7))
    assert exp_ema_scheduler(threshold - 1, 0.999, 100, 1e-7) < 1
    assert exp_ema_scheduler(threshold, 0.999, 100, 1e-7) == 1


# ------------------------------------------------------------------------------------------------------------- freezing


@BOTH
def test_freezing_stops_extractor_and_projection(model_type: str) -> None:
    model = tiny_model(model_type, freeze_step=2).train()
    frozen = [*model.feature_extractor.parameters(), *model.feature_projection.parameters()]
    for step in (1, 2, 3):
        loss, _ = model(torch.randn(2, 1500), mask=torch.rand(2, num_frames(model, 1500)) < 0.5)
        loss.mean().backward()
        trained = [p.grad is not None for p in frozen]
        assert not any(trained) if step == 3 else all(trained)
        model.update_ema(step)
    features, _ = model.project(torch.randn(1, 1500))
    assert not features.requires_grad
    assert model.mask_embedding.grad is not None


@pytest.mark.parametrize("norm_first", [False, True])
def test_spidrs_last_norm_does_not_affect_the_loss(norm_first: bool) -> None:
    model = tiny_model(encoder_layer_norm_first=norm_first, **NO_DROPOUT).train()
    unused = model.student.layer_norm if norm_first else model.student.layers[-1].final_layer_norm
    before = unused.weight.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    loss, _ = model(torch.randn(2, 1500), mask=torch.rand(2, num_frames(model, 1500)) < 0.5)
    loss.mean().backward()
    optimizer.step()
    assert unused.weight.grad is None
    assert torch.equal(unused.weight, before)
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []  # nothing else is unused, so DDP need not look for it


# ------------------------------------------------------------------------------------------------------------ codebooks


@pytest.mark.parametrize("mode", ["layer_norm", "group_norm"])
def test_codebooks_from_data_are_frames_of_the_teacher(mode: str) -> None:
    model = tiny_model(extractor_mode=mode)
    waveforms, lengths = padded(), torch.tensor(LENGTHS)
    frames = torch.arange(num_frames(model, 3000))
    mask = (frames < torch.tensor([num_frames(model, n) for n in LENGTHS])[:, None])[:, None, None]
    generator = torch.Generator().manual_seed(0)
    model.init_codebooks(waveforms, attention_mask=mask, lengths=lengths, generator=generator)
    features, _ = model.project(waveforms, mask, lengths)
    outputs = model.teacher.get_intermediate_outputs(features, mask)[-3:]
    for codebook, output in zip(model.codebooks, outputs, strict=True):
        assert torch.equal(codebook.counts, torch.ones(12))
        normed = F.instance_norm(output.transpose(1, 2)).transpose(1, 2)[mask[:, 0, 0]]
        nearest = torch.cdist(codebook.codebook, normed).amin(1)
        assert nearest.max() < 1e-2
        assert len(codebook.codebook.unique(dim=0)) == 12
    with pytest.raises(InputError, match="1 frames are too few to draw 12 codewords"):
        model.init_codebooks(torch.randn(1, 90))


# ----------------------------------------------------------------------------------------------------------- everything


def test_wrong_configuration_class() -> None:
    with pytest.raises(TypeError, match="SpidR needs a SpidRConfig, not a DinoSRConfig"):
        SpidR(DinoSRConfig())


@BOTH
def test_initial_weights_are_a_function_of_the_seed(model_type: str) -> None:
    first, second, third = (tiny_model(model_type, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["mask_embedding"], third["mask_embedding"])
    assert 0 <= first["mask_embedding"].min() <= first["mask_embedding"].max() <= 1


DDP_LOOP = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from helpers.small_models import tiny_model
from spidr.models.metrics import perplexity
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
rank = dist.get_rank()
model = tiny_model(sys.argv[2], encoder_dropout=0.0, encoder_attention_dropout=0.0, encoder_layer_drop=0.0).train()
network = DistributedDataParallel(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
data = torch.load(sys.argv[3])
for step, (waveforms, mask) in enumerate(data, start=1):
    loss, outputs = network(waveforms[2 * rank : 2 * rank + 2], mask=mask[2 * rank : 2 * rank + 2])
    loss.mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.update_ema(step)
own = torch.eye(4)[2 * rank : 2 * rank + 2]
perplexities = [perplexity(own), perplexity(own.softmax(-1), tokenwise=True)]
torch.save({"model": model.state_dict(), "ppl": outputs["target_ppl"], "own": perplexities}, f"{sys.argv[4]}.{rank}")
dist.destroy_process_group()
"""


@BOTH
def test_a_users_own_ddp_loop_keeps_codebooks_equal(model_type: str, tmp_path: Path) -> None:
    """Two processes with half a batch each do what one process does with the whole."""
    torch.manual_seed(0)
    model = tiny_model(model_type, **NO_DROPOUT).train()
    frames = num_frames(model, 1500)
    row = torch.zeros(frames, dtype=torch.bool)
    row[: frames // 2] = True
    data = [
        (torch.randn(4, 1500), torch.stack([row[torch.randperm(frames)] for _ in range(4)])) for _ in range(3)
    ]  # equal numbers of masked frames, so that the mean of means is the mean
    torch.save(data, tmp_path / "data.pt")
    script = tmp_path / "loop.py"
    script.write_text(DDP_LOOP)
    tests = str(Path(__file__).parents[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    subprocess.run([*command, tests, model_type, str(tmp_path / "data.pt"), str(tmp_path / "out")], check=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step, (waveforms, mask) in enumerate(data, start=1):
        loss, outputs = model(waveforms, mask=mask)
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_ema(step)
    ranks = [torch.load(tmp_path / f"out.{rank}") for rank in range(2)]
    for name, value in model.state_dict().items():
        assert torch.equal(ranks[0]["model"][name], ranks[1]["model"][name]), name
        torch.testing.assert_close(ranks[0]["model"][name], value, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(ranks[0]["ppl"], outputs["target_ppl"])
    rows = torch.eye(4)
    of_all = [perplexity(rows), perplexity(rows.softmax(-1), tokenwise=True)]
    torch.testing.assert_close(ranks[0]["own"], of_all)
    torch.testing.assert_close(ranks[1]["own"], of_all)
