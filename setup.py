"""What setup.cfg cannot say: the row codec, compiled. Where it cannot be, the pure one serves."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension("cafeteria_orch.wire._rows", ["cafeteria_orch/wire/_rows.pyx"], optional=True)
    ],
)
