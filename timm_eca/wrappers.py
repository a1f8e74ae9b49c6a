"""Where a wrapper for feature extraction has what the model inside of it had."""

from dataclasses import replace

from torch import nn

from .sites import Site

__all__ = ["moved", "moved_site", "paths_in"]


def paths_in(wrapper: nn.Module, model: nn.Module) -> dict[str, str]:
    """Return the paths that modules of a model have in a wrapper, by their paths in the model.

    A wrapper may give a model's children other names, or, as fx does, copy containers and keep what is in them. So the
    path of a module tells those of its parents too, up to the first that is named otherwise.
    """
    held = {id(module): path for path, module in wrapper.named_modules()}
    paths: dict[str, str] = {}
    for path, module in model.named_modules():
        new = held.get(id(module))
        while new is not None and path not in paths:
            paths[path] = new
            path, _, name = path.rpartition(".")
            new, _, new_name = new.rpartition(".")
            if name != new_name or not name:
                break
    return paths


def moved(path: str, paths: dict[str, str]) -> str:
    """Return the new path of a module or tensor, known or not: that of its nearest parent known, and the rest."""
    parent = path
    while parent and parent not in paths:
        parent = parent.rpartition(".")[0]
    return ".".join(filter(None, (paths.get(parent, parent), path[len(parent) :].lstrip("."))))


def moved_site(site: Site, paths: dict[str, str]) -> Site:
    """Return a site with the paths that all it names have in the wrapper."""
    return replace(
        site,
        path=moved(site.path, paths),
        like=moved(site.like, paths),
        scales=tuple("/" * path.startswith("/") + moved(path.lstrip("/"), paths) for path in site.scales),
        block=None if site.block is None else moved(site.block, paths),
        removes=tuple(moved(path, paths) for path in site.removes),
    )
