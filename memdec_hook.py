"""Start-up hook (`memdec_hook.pth`): makes the `memdec-*` models and `harness_tasks/` known to the stock `lm_eval`.

Nothing is imported until lm_eval itself imports `lm_eval.models` or `lm_eval.tasks.manager`; other programs pay for one
small module at start. lm_eval 0.4.13 reads no entry points; a release that does registers the same targets by itself,
and the hook leaves a name alone that is already there. MEMDEC_NO_HOOK=1 switches it off.

lm_eval must work without us as well. So whatever fails here (the package is gone, another lm_eval has other names or
arguments) is one warning, and lm_eval goes on as if the hook were not there.
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
        if spec is None or not hasattr(spec.loader, "exec_module"):
            return None
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            _try(after, module)

        try:
            spec.loader.exec_module = exec_module
        except AttributeError as error:  # a loader without attributes of its own
            _warn(error)
            return None
        return spec


_warned = False


def _try(step, *given):
    """Run a step of the hook and return its result; a failure is one warning, and None."""
    try:
        return step(*given)
    except Exception as error:
        _warn(error)
        return None


def _warn(error):
    global _warned
    if not _warned:
        _warned = True
        reason = " ".join(str(error).split())[:200]
        print(
            "memdec: lm_eval starts without the memdec-* models and tasks: expected a matching memdec and lm_eval 0.4.13, "
            f"found {type(error).__name__}: {reason}; install memdec again, or set MEMDEC_NO_HOOK=1",
            file=sys.stderr,
        )


_MODELS = {
    "memdec-interp": "models:MemDecInterp",
    "memdec-knnlm": "baselines:MemDecKnnLM",
    "memdec-icrag": "baselines:MemDecIcRag",
}


def _register_models(module):
    from importlib.util import find_spec

    from lm_eval.api.registry import model_registry

    if find_spec("memdec") is None:
        raise ModuleNotFoundError("no package memdec")
    for name, target in _MODELS.items():
        if name not in model_registry:
            model_registry.register(name, target=f"memdec.harness.{target}")


def _add_tasks(module):
    from memdec import HARNESS_TASKS

    manager = module.TaskManager
    build, match = manager.__init__, manager.match_tasks

    def __init__(self, *args, **kwargs):
        args, kwargs = _try(_with_tasks, build, str(HARNESS_TASKS), self, args, kwargs) or (args, kwargs)
        build(self, *args, **kwargs)

    def match_tasks(self, task_list, *args, **kwargs):
        found = match(self, task_list, *args, **kwargs)
        if not found:
            _try(_suggest, self, task_list)
        return found

    __init__.__wrapped__ = build
    match_tasks.__wrapped__ = match
    manager.__init__ = __init__
    manager.match_tasks = match_tasks


def _with_tasks(build, ours, manager, args, kwargs):
    """The arguments of a TaskManager with our folder before the folders that the user gives."""
    import inspect
    import os

    bound = inspect.signature(build).bind(manager, *args, **kwargs)
    bound.apply_defaults()
    if not bound.arguments["include_defaults"] or not os.path.isdir(ours):
        return args, kwargs
    given = bound.arguments["include_path"]
    given = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
    if ours in map(str, given):
        return args, kwargs
    bound.arguments["include_path"] = [ours, *given]
    return bound.args[1:], bound.kwargs


def _suggest(manager, task_list):
    """End the `lm_eval` command with one line if a name is nearly the name of one of our tasks.

    Other programs get what lm_eval itself says.
    """
    import os

    from memdec.errors import MemDecError, one_line_errors
    from memdec.tasks.task import check_names

    ours = [name for name in manager.all_tasks if name.startswith(_PREFIXES)]
    for name in task_list:
        if isinstance(name, str) and name.startswith(_PREFIXES) and not {*"*?["} & {*name} and not os.path.exists(name):
            try:
                with one_line_errors():
                    check_names([name], ours)
            except MemDecError:
                pass


_PREFIXES = ("memdec", "dcpmi")  # of the names of our tasks, except pubmedqa
_AFTER = {"lm_eval.models": _register_models, "lm_eval.tasks.manager": _add_tasks}


def install():
    """Put the finder first, once."""
    if not any(type(finder).__name__ == "_Finder" and type(finder).__module__ == __name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
