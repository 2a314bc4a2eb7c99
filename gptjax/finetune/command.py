"""`gptjax finetune`: what can be wrong is told before a device is touched."""

from collections.abc import Callable
from typing import Any

from gptjax.config import Config
from gptjax.finetune import examples, exchanges, recipe


def fit(
    path: str,
    task: str,
    data: str,
    valid: str,
    override: Callable[[Config], Config],
    resolved: Callable[[Config], None],
) -> tuple[Config, dict[str, float]]:
    """Fine-tunes a base in its run folder, from where it stands; the last evaluation.

    `override` changes the recipe's configuration, `resolved` is told what became of it.
    """
    base = recipe.base_of(path)
    cfg = override(recipe.begun(base, task, data, valid))
    f = cfg.finetune
    recipe.check_model(base.cfg.model, cfg.model)
    sets = (("train", f.data, "--data"), ("valid", f.valid, "--valid"))
    given: dict[str, Any]
    if f.task == "answer":
        given = {name: exchanges.read(path, o, base.tokenizer) for name, path, o in sets}
        cfg, *rows = recipe.answered(cfg, base, given["train"], given["valid"])
    else:
        given = {name: examples.read(path, f.task, o) for name, path, o in sets}
        cfg, *rows = recipe.labelled(cfg, base.tokenizer, given["train"], given["valid"])
    cfg.check()
    resolved(cfg)
    from gptjax import distributed, run, watch
    from gptjax.progress import Progress

    distributed.join(cfg.watch.lost, Progress().say)
    progress = Progress(shown=distributed.first())
    with watch.Watch(cfg.watch) as watched, run.claim(cfg) as changes:
        for change in changes:
            progress.say(f"changed since the run was begun: {change}")
        import jax

        from gptjax.finetune import tuning

        cfg.check(jax.device_count(), jax.process_count())
        both = dict(zip(given, rows, strict=True))
        with run.entered_mesh(cfg):
            return cfg, tuning.tune(cfg, base, given, both, watched, progress)
