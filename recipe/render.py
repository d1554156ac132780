"""Renders recipe.yaml as rattler-build does, for Linux; nothing is solved or built: `make dist`."""

from pathlib import Path

from rattler_build import PlatformConfig, RenderConfig, Stage0Recipe, VariantConfig

recipe = Stage0Recipe.from_file(Path(__file__).with_name("recipe.yaml"))
linux = RenderConfig(PlatformConfig(target_platform="linux-64"))
variants = VariantConfig({"python": ["3.11.* *_cpython"], "cxx_compiler": ["gxx"]})
(rendered,) = recipe.render(variants, linux)
package = rendered.recipe.package
print(f"recipe.yaml renders as {package.name} {package.version}")
