"""Start-up hook (`memdec_hook.pth`): makes the `memdec-*` models and `harness_tasks/` known to the stock `lm_eval`.

Nothing is imported until lm_eval itself imports `lm_eval.models` or `lm_eval.tasks.manager`; other programs pay for one
small module at start. lm_eval 0.4.13 reads no entry points; a release that does registers the same targets by itself,
and the hook leaves a name alone that is already there. MEMDEC_NO_HOOK=1 switches it off.
"""

import sys


class _Finder:
    """Meta path finder that lets the normal import machinery load two modules, then runs one function on each."""

    def find_spec(self, name, path=None, target=None):
        after = _AFTER.get(name)
        if after is None:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            after(module)

        spec.loader.exec_module = exec_module
        return spec


_MODELS = {
    "memdec-interp": "models:MemDecInterp",
    "memdec-knnlm": "baselines:MemDecKnnLM",
    "memdec-icrag": "baselines:MemDecIcRag",
}


def _register_models(module):
    from lm_eval.api.registry import model_registry

    for name, target in _MODELS.items():
        if name not in model_registry:
            model_registry.register(name, target=f"memdec.harness.{target}")


def _add_tasks(module):
    from memdec import HARNESS_TASKS

    manager = module.TaskManager
    build = manager.__init__

    def __init__(self, verbosity=None, include_path=None, include_defaults=True, metadata=None):
        given = [] if include_path is None else [include_path] if isinstance(include_path, str) else include_path
        given = list(given) if isinstance(given, (list, tuple)) else [given]
        known = str(HARNESS_TASKS) in map(str, given) or not HARNESS_TASKS.is_dir()
        paths = [str(HARNESS_TASKS), *given] if include_defaults and not known else given
        build(self, verbosity, paths or None, include_defaults, metadata)

    __init__.__wrapped__ = build
    manager.__init__ = __init__


_AFTER = {"lm_eval.models": _register_models, "lm_eval.tasks.manager": _add_tasks}


def install():
    """Put the finder first, once."""
    if not any(type(finder).__name__ == "_Finder" and type(finder).__module__ == __name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
