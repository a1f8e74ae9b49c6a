"""Rules of the house that a machine can check."""

import ast
import importlib
import pkgutil
from importlib.metadata import entry_points, version

import timm

import timm_eca

MODULES = [m.name for m in pkgutil.walk_packages(timm_eca.__path__, "timm_eca.")]
MODULES = [m for m in MODULES if not m.endswith(("._native", "._native_avx512"))]  # compiled, called by address
# Each may import from those before it, and from itself.
STREET = [
    "checkout",
    "errors",
    "outputs",
    "whole_file",
    "paper",
    "layers",
    "spec",
    "families",
    "block_rule",
    "blocks",
    "gating",
]
STREET += ["fused", "branches", "sites", "stages", "placement", "identity", "making"]
STREET += [
    "wrappers",
    "checkpoint",
    "inject",
    "constructors",
    "weights",
    "fit",
    "hub_errors",
    "hub_cache",
    "models",
    "timm_hooks",
    "coverage",
    "plan",
    "portable",
    "cards",
    "layouts",
]
STREET += ["checkpoint_files", "saving", "hub", "convert", "complexity", "scripts", "demo", "cli", "__main__"]


def imports_of(module):
    """The modules of this package that a module imports, wherever in the file."""
    spec = importlib.util.find_spec(module)
    package = module if spec.submodule_search_locations else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(spec.loader.get_source(module))):
        if isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_one_way_street():
    rooms = {m.split(".")[1] for m in MODULES}
    assert rooms == set(STREET)
    for module in MODULES:
        room = module.split(".")[1]
        for imported in imports_of(module):
            if imported.split(".")[0] == "timm_eca":
                assert imported.split(".")[1] in STREET, f"{module} imports the package root"
                assert STREET.index(imported.split(".")[1]) <= STREET.index(room), f"{module} imports {imported}"


def test_all_is_a_list_of_what_is_there():
    for module in map(importlib.import_module, ["timm_eca", *MODULES]):
        assert isinstance(module.__all__, list)
        assert all(hasattr(module, name) for name in module.__all__)


def test_file_names_are_not_timms():
    """timm files entrypoints under the last part of their module's name."""
    theirs = set(timm.list_modules()) - {"eca_resnet", "eca_resnext", "eca_mobilenetv2", "eca_inception"}
    assert not {m.rsplit(".", 1)[1] for m in MODULES} & theirs


def test_optional_packages_wait_for_their_use(run_python):
    modules = "'matplotlib', 'sklearn', 'scipy', 'pytest', 'thop'"
    run_python(f"import sys, timm_eca.cli\nassert not {{{modules}}} & set(sys.modules)")


def test_metadata():
    assert timm_eca.__version__ == version("timm-eca")
    (command,) = [e for e in entry_points(group="console_scripts") if e.name == "timm-eca"]
    assert command.load() is importlib.import_module("timm_eca.cli").main
