"""For an installed hsae, outside the checkout: every module imports, every plan loads, zarr knows bfloat16."""

import importlib
import pkgutil
import sys

import hsae.cache
import hsae.cli
import hsae.eval
import hsae.train
from hsae.train.config.plan import load_plan, packaged_plans

OF_EXTRAS = {
    "hsae.cache.storage.http": "aiohttp",
    "hsae.cache.storage.connections": "uvicorn",
    "hsae.cache.storage.s3": "aiobotocore",
    "hsae.train.model.sparse_kernels": "triton",
}  # modules that cannot be imported without the package of an extra, or of torch for CUDA

assert "site-packages" in hsae.cache.__file__, hsae.cache.__file__
count = 0
for package in (hsae.cache, hsae.train, hsae.eval, hsae.cli):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as missing:
            assert OF_EXTRAS.get(module.name) == missing.name, (module.name, missing)
        count += 1
plans = packaged_plans()
assert "gemma-2-2b" in plans, plans
for plan in plans:
    load_plan(plan)

from zarr.dtype import parse_dtype  # noqa: E402

assert parse_dtype("bfloat16", zarr_format=3).to_json(zarr_format=3) == "bfloat16"
print(f"{count} modules and {len(plans)} plans work on Python {sys.version.split()[0]}")
