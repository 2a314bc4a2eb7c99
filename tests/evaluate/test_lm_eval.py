"""LMEvalAdapter in lm_eval's own harness, offline, compared with its `hf` model.

Skipped where lm_eval is not installed: pip install -e '.[lm-eval]'.
"""

import json
import os
from pathlib import Path

import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
lm_eval = pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager  # noqa: E402

from gptjax import load_model  # noqa: E402
from gptjax.config import Config, EvalConfig, TokenizerConfig  # noqa: E402
from gptjax.errors import ConfigError  # noqa: E402
from gptjax.evaluate import LMEvalAdapter, TaskEvaluator, read_tasks  # noqa: E402
from gptjax.hf import read_tokenizer, safetensors  # noqa: E402
from gptjax.runtime.progress import Progress  # noqa: E402
from gptjax.tokenizer import ByteTokenizer, train  # noqa: E402

pytestmark = pytest.mark.slow

TASKS = {
    "hellaswag": """
output_type: multiple_choice
process_docs: !function prepare.process_docs
doc_to_text: "{{query}}"
doc_to_target: "{{label}}"
doc_to_choice: "choices"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "arc": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices.label.index(answerKey)}}"
doc_to_choice: "{{choices.text}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "lambada": """
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list: [{metric: perplexity, aggregation: perplexity}, {metric: acc}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
""",
    "written": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
""",
}
PREPARE = "from lm_eval.tasks.hellaswag.utils import process_docs  # noqa"

SENTENCES = [
    "The capital of France is the city of Paris",
    "She opened the door and walked slowly into the room",
    "Two plus two equals four, and four plus four equals eight",
    "In the morning the sun rises in the east",
    "Water boils at one hundred degrees, and freezes at zero",
    "The dog barked at the mailman until he went away",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Task files and the YAML files that declare them to the harness."""
    folder = tmp_path_factory.mktemp("tasks")
    arc = [
        {
            "question": f"Which word ends this: {text.rpartition(' ')[0]}?",
            "choices": {
                "text": [text.split()[-1], "a green horse", "nothing at all", "x"],
                "label": ["A", "B", "C", "D"],
            },
            "answerKey": "ABCD"[number % 2],
        }
        for number, text in enumerate(SENTENCES)
    ]
    hellaswag = [
        {
            "activity_label": "Sharing  facts",
            "ctx_a": f"[header] How to tell [title] {text[:20]}",
            "ctx_b": text[20:30],
            "endings": [
                text[30:],
                "[title] Swim. [step] Then jump.",
                "sing [a song] loudly.",
                "zz",
            ],
            "label": str(number % 3),
        }
        for number, text in enumerate(SENTENCES)
    ]
    texts = [{"text": text} for text in SENTENCES]
    rows = {"arc": arc, "hellaswag": hellaswag, "lambada": texts}
    rows |= {"rolling": [{"text": " ".join(SENTENCES) * 3}, *texts], "written": texts}
    (folder / "prepare.py").write_text(PREPARE)
    for kind, lines in rows.items():
        data = folder / f"{kind}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        head = f"task: local_{kind}\ndataset_path: json\ntest_split: test\n"
        head += f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        (folder / f"{kind}.yaml").write_text(head + TASKS[kind])
    return folder


@pytest.fixture
def harness(files, tmp_path, monkeypatch):
    """Runs all tasks on a model: results by task and metric, and the model's responses."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    manager = TaskManager(include_path=str(files), include_defaults=False)

    def run(model, **options):
        done = lm_eval.simple_evaluate(
            model,
            tasks=[f"local_{kind}" for kind in TASKS],
            task_manager=manager,
            bootstrap_iters=0,
            **options,
        )
        results = {
            (task.removeprefix("local_"), name.partition(",")[0]): value
            for task, row in done["results"].items()
            for name, value in row.items()
            if name.endswith(",none") and isinstance(value, float)
        }
        answers = {task: [s["resps"] for s in row] for task, row in done["samples"].items()}
        return results, answers

    return run


def test_harness_agrees_with_gptjax_eval(
    harness, files, byte_params, byte_model, put, scorer, on_mesh
) -> None:
    cfg = Config(model=byte_model, eval=EvalConfig(batch=4))
    own = {}
    with on_mesh(2, 2, 2):
        params = put(byte_params, byte_model)
        adapter = LMEvalAdapter(params, cfg, ByteTokenizer(), progress=Progress(shown=False))
        results, answers = harness(adapter)
        for file in read_tasks([f"{k}:{files}/{k}.jsonl" for k in ("arc", "hellaswag", "lambada")]):
            own |= TaskEvaluator(file, ByteTokenizer(), scorer(), file.kind).run(params)
    for name in ("acc", "acc_norm"):
        assert results["arc", name] == own[f"arc_{name}"]
        assert results["hellaswag", name] == own[f"hellaswag_{name}"]
    assert results["lambada", "acc"] == own["lambada_acc"]
    assert results["lambada", "perplexity"] == pytest.approx(own["lambada_perplexity"], rel=1e-5)
    assert len(answers["local_written"]) == len(SENTENCES)


def test_unsupported_generation_setting_is_an_error(byte_params, byte_model, on_mesh) -> None:
    with on_mesh(1):
        adapter = LMEvalAdapter(byte_params, Config(model=byte_model), ByteTokenizer())
    with pytest.raises(ConfigError, match="not supported: num_beams=4"):
        adapter._settings({"until": "\n", "num_beams": 4})
    sampled = adapter._settings({"do_sample": True, "temperature": 0.5, "max_new_tokens": 3})
    assert (sampled.temperature, sampled.max_tokens, sampled.stop) == (0.5, 3, ())
    assert adapter._settings({"do_sample": False, "temperature": 0.5}).temperature == 0


@pytest.fixture
def hugging_face_folder(tmp_path) -> Path:
    """A Llama of random weights, sharp enough to have preferences, with a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "llama"
    config = LlamaConfig(
        vocab_size=380,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    cfg = TokenizerConfig(kind="huggingface", algorithm="byte_bpe", vocab_size=380)
    train(SENTENCES * 20, cfg).save(folder)
    return folder


def test_adapter_agrees_with_the_hf_model_of_lm_eval(harness, on_mesh, hugging_face_folder) -> None:
    from lm_eval.models.huggingface import HFLM

    folder = hugging_face_folder
    theirs = harness(HFLM(str(folder), dtype="float32", batch_size=4, max_length=256, device="cpu"))
    source = safetensors.open_source(folder)
    tokenizer = read_tokenizer.tokenizer_of(source, print)
    cfg = load_model.config_of(source.model, tokenizer, str(folder))
    with on_mesh():
        params = safetensors.read_params(source)
        ours = harness(LMEvalAdapter(params, cfg, tokenizer, batch_size=4, max_length=256))
    print(f"\n{ours[0]}\n{theirs[0]}")
    assert ours[0].keys() == theirs[0].keys()
    assert len(ours[0]) == 9
    assert ours[0] == pytest.approx(theirs[0], rel=1e-3)
    assert ours[1]["local_written"] == theirs[1]["local_written"]
    for task in ("arc", "hellaswag", "lambada", "rolling"):
        for one, other in zip(ours[1][f"local_{task}"], theirs[1][f"local_{task}"], strict=True):
            for (mine,), (hers,) in zip(one, other, strict=True):
                pair = (mine, hers) if task != "rolling" else ((mine, 0), (hers, 0))
                assert pair[0][0] == pytest.approx(pair[1][0], rel=1e-3, abs=1e-3)
                assert pair[0][1] == pair[1][1]
