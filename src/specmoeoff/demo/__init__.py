"""The demo model: a real small model, upcycled to a mixture of experts, and real prompts for it."""

from specmoeoff.demo.build import DemoPaths, build_demo
from specmoeoff.demo.fetch import Progress, cache_directory
from specmoeoff.demo.manifest import verify
from specmoeoff.demo.prompts import load_prompts

__all__ = ["DemoPaths", "Progress", "build_demo", "cache_directory", "load_prompts", "verify"]
