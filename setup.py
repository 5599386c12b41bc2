"""What setup.cfg cannot say: the compiled modules. Where one cannot be built, Python serves."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(f"cafeteria_orch.{name}", [f"cafeteria_orch/{path}.pyx"], optional=True)
        for name, path in (
            ("wire._rows", "wire/_rows"),
            ("store._wire_tables", "store/_wire_tables"),
        )
    ],
)
