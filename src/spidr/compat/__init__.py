"""Names that other packages import from published versions of ``spidr``, thin over the parts of this one.

Import them from where the published package has them, such as ``spidr.models.components``.
"""
