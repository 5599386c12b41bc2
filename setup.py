"""What setup.cfg cannot say: the compiled modules. Where one cannot be built, Python serves."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            f"cafeteria_orch.{name}",
            [f"cafeteria_orch/{name.replace('.', '/')}.pyx"],
            depends=["cafeteria_orch/wire/_rows.pxd"],
            optional=True,
        )
        for name in ("wire._rows", "store._wire_tables")
    ],
)
