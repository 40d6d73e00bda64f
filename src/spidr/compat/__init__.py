"""Names that other packages import from published versions of ``spidr``, as thin layers over this one.

Import them from where the published package has them, such as ``spidr.models.components``.
"""
