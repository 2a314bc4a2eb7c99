"""Hugging Face folders: round trips of every family, and the errors of folders that do not fit."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from gptjax import load_model
from gptjax import tokenizer as tokenizers
from gptjax.checkpoint.checkpointer import leaves_by_path
from gptjax.config import ModelConfig, MoeConfig, RopeConfig, TokenizerConfig
from gptjax.errors import DataError, MismatchError
from gptjax.hf import families, read_tokenizer, safetensors
from gptjax.tokenizer import train_sentencepiece
from gptjax.tokenizer.to_huggingface import byte_letters

pytestmark = pytest.mark.usefixtures("quick_compile")

LLAMA = ModelConfig(
    vocab_size=99,
    context=64,
    layers=2,
    embed=32,
    heads=8,
    mlp=48,
    activation="swiglu",
    norm="rmsnorm",
    positions="rope",
    linear_bias=False,
    tied_embeddings=False,
)
FALCON = replace(LLAMA, activation="gelu", norm="layernorm", residual="parallel")
GPT = ModelConfig(vocab_size=99, context=64, layers=2, embed=32, heads=8)
MODELS = {
    "openai-gpt": replace(GPT, norm_position="post"),
    "gpt2": replace(GPT, mlp=80),
    "llama": replace(
        LLAMA,
        kv_heads=2,
        head_dim=16,
        rope=RopeConfig(5e5, scaling="low_frequency", factor=8.0, original_context=32),
    ),
    "mistral": replace(LLAMA, kv_heads=2, window=7, pattern=("window",)),
    "qwen3": replace(
        LLAMA,
        layers=4,
        kv_heads=4,
        qk_norm=True,
        tied_embeddings=True,
        window=7,
        pattern=("full", "window"),
    ),
    "mixtral": replace(LLAMA, kv_heads=2, moe=MoeConfig(experts=4, balance_loss=0.02)),
    "qwen3_moe": replace(
        LLAMA, qk_norm=True, moe=MoeConfig(experts=6, top_k=3, hidden=24, normalize=False)
    ),
    "falcon": replace(FALCON, kv_heads=1, shared_norm=True, tied_embeddings=True),
}


@pytest.fixture(scope="module")
def folders(on_mesh, random_params, tmp_path_factory):
    """A checkpoint folder of each family, and its parameters."""
    made = {}
    with on_mesh():
        for name, model in MODELS.items():
            folder = tmp_path_factory.mktemp(name)
            params = random_params(model)
            # Rows that pad the table are not written, and are read as zeros.
            rows = np.arange(model.table)[:, None] < model.vocab_size
            for table in {"embed", "head"} & set(params):
                params[table] = params[table] * rows
            safetensors.write_folder(folder, params, model)
            made[name] = folder, jax.device_get(params)
    return made


SOME = ("gpt2", "llama")


@pytest.mark.parametrize(
    "name", [n if n in SOME else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_round_trip_is_bit_exact_on_one_and_on_eight_devices(on_mesh, folders, name):
    folder, params = folders[name]
    assert json.loads((folder / "config.json").read_text())["model_type"] == name
    source = safetensors.open_source(folder)
    assert source.notes == ()
    for mesh in ((1, 1, 1), (4, 2, 1) if source.model.kv == 1 else (2, 2, 2)):
        with on_mesh(*mesh):
            back = safetensors.read_params(source)
            shards = {str(s.index) for s in back["embed"].addressable_shards}
            assert len(shards) == mesh[1] * mesh[2]
        for path, value in leaves_by_path(jax.device_get(back)).items():
            np.testing.assert_array_equal(value, leaves_by_path(params)[path], err_msg=path)


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("dtype", ["BF16", pytest.param("F16", marks=pytest.mark.slow)])
def test_round_trip_of_half_precision_is_byte_exact(on_mesh, folders, tmp_path, name, dtype):
    with on_mesh():
        params = safetensors.read_params(safetensors.open_source(folders[name][0]))
        safetensors.write_folder(tmp_path, params, MODELS[name], dtype=dtype)
        assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1
        narrow = safetensors.open_source(tmp_path)
        made = safetensors.tensors(safetensors.read_params(narrow), narrow.model, narrow.family)
        for key, value in made:
            assert narrow.dtype(key) == dtype
            assert safetensors.cast(value, dtype).tobytes() == narrow.tensor(key).tobytes(), key


def edited(folder: Path, target: Path, tensors=lambda t: t, **changes) -> Path:
    """A copy of a checkpoint folder with changed tensors or values of config.json."""
    with safe_open(folder / "model.safetensors", "np") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors(stored), target / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_missing_unexpected_and_misshapen_tensors_are_all_reported(folders, tmp_path):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.extra.weight"] = np.zeros(3, np.float32)
        tensors["model.norm.weight"] = np.zeros(7, np.float32)
        return tensors

    with pytest.raises(MismatchError) as error:
        safetensors.open_source(edited(folders["llama"][0], tmp_path, change))
    assert sorted(error.value.differences) == [
        "model.extra.weight: unexpected; the model has no such tensor",
        "model.layers.1.mlp.up_proj.weight: missing",
        "model.norm.weight: shape [7]; by config.json [32]",
    ]


def test_stored_output_layer_must_equal_the_tied_embedding(folders, tmp_path, on_mesh):
    folder = folders["qwen3"][0]
    (tmp_path / "same").mkdir()
    (tmp_path / "other").mkdir()
    tie = lambda by: lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + by}
    safetensors.open_source(edited(folder, tmp_path / "same", tie(np.float32(0))))
    with pytest.raises(MismatchError, match=r"lm_head\.weight: unexpected"):
        safetensors.open_source(edited(folder, tmp_path / "other", tie(np.float32(1))))


def test_names_without_prefix_and_buffers_are_accepted(folders, tmp_path):
    def change(tensors):
        tensors = {k.removeprefix("transformer."): v for k, v in tensors.items()}
        return tensors | {"h.0.attn.bias": np.ones((1, 1, 64, 64), np.float32)}

    source = safetensors.open_source(edited(folders["gpt2"][0], tmp_path, change))
    assert source.tensor("transformer.wpe.weight").shape == (64, 32)


def test_large_checkpoints_are_split_into_indexed_files(folders, tmp_path, on_mesh, monkeypatch):
    monkeypatch.setattr(safetensors, "_MAX_FILE_BYTES", 20_000)
    folder, params = folders["mixtral"]
    with on_mesh():
        safetensors.write_folder(
            tmp_path, safetensors.read_params(safetensors.open_source(folder)), MODELS["mixtral"]
        )
        files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
        assert len(files) > 3
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(
            t.nbytes
            for _, t in safetensors.tensors(params, MODELS["mixtral"], families.FAMILIES["mixtral"])
        )
        back = safetensors.read_params(safetensors.open_source(tmp_path))
    assert jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(back), params))
    index["weight_map"]["model.norm.weight"] = "../model.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="outside its folder"):
        safetensors.open_source(tmp_path)


def test_pickled_weights_are_rejected_with_a_command_to_convert_them(folders, tmp_path):
    (tmp_path / "config.json").write_text((folders["gpt2"][0] / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(DataError, match=r"pickle runs code.*save_pretrained"):
        safetensors.open_source(tmp_path)


def test_folder_without_a_usable_config_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no config\.json"):
        safetensors.open_source(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        safetensors.open_source(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(MismatchError, match="model_type='bert': not supported"):
        safetensors.open_source(tmp_path)


def test_damaged_file_is_reported_by_name(folders, tmp_path):
    folder = edited(folders["llama"][0], tmp_path)
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match=r"model\.safetensors: cannot be read as safetensors"):
        safetensors.open_source(folder)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "has no factor"),
        ("llama", {"attention_bias": True}, "attention_bias and mlp_bias differ"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"activation_function": "relu"}, "activation_function='relu'"),
        ("gpt2", {"n_embd": "wide"}, "invalid value"),
        ("gpt2", {"n_layer": 0}, "model.layers=0: must be at least 1"),
        ("llama", {"head_dim": 15}, "need an even number"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("mistral", {"attention_bias": True}, "attention_bias=True"),
        ("mixtral", {"rms_norm_eps": None}, "has no rms_norm_eps"),
        ("mixtral", {"rope_parameters": None, "rope_theta": None}, "has no rope_theta"),
        ("llama", {"model_type": ["llama"]}, "not supported"),
        ("llama", {"num_hidden_layers": None}, "has no num_hidden_layers"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("falcon", {"activation": "relu"}, "activation='relu'"),
    ],
)
def test_unsupported_setting_is_reported_by_its_key(folders, tmp_path, family, changes, message):
    changes = {"rope_scaling": None} | changes  # which would come before rope_parameters
    with pytest.raises((DataError, MismatchError), match=message):
        safetensors.open_source(edited(folders[family][0], tmp_path, **changes))


def test_settings_that_are_not_known_are_refused(folders, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 1e4, "twist": 1}
    changes = {"rope_scaling": None, "rope_parameters": rope}
    changes |= {"new_trick": True, "quantization_config": {"bits": 4}}
    known = {
        "pruned_heads": {},
        "temperature": 0.7,
        "id2label": {"0": "x"},
        "another": None,
        "_a": 1,
    }
    with pytest.raises(MismatchError, match="settings that gptjax does not know") as error:
        safetensors.open_source(edited(folders["llama"][0], tmp_path, **changes, **known))
    assert error.value.differences == [
        "new_trick=True",
        "quantization_config={'bits': 4}",
        "rope_parameters.twist=1",
    ]
    with pytest.raises(MismatchError, match="add_cross_attention=True"):
        safetensors.open_source(edited(folders["gpt2"][0], tmp_path, add_cross_attention=True))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
        ("mixtral", {"layer_types": ["sliding_attention"] * 2}),
    ],
)
def test_layers_of_other_kinds_than_the_family_has_are_refused(folders, tmp_path, family, changes):
    with pytest.raises(MismatchError, match="layer_types has"):
        safetensors.open_source(edited(folders[family][0], tmp_path, **changes))


def test_a_whole_file_comes_before_an_index_and_what_is_not_read_is_told(folders, tmp_path):
    folder = edited(folders["llama"][0], tmp_path)
    (folder / "model.safetensors.index.json").write_text("{}")
    save_file({"old": np.zeros(1, np.float32)}, folder / "model-00001-of-00001.safetensors")
    (note,) = safetensors.open_source(folder).notes
    assert note == (
        f"{folder}: model.safetensors is read, and model-00001-of-00001.safetensors, "
        "model.safetensors.index.json beside it is not"
    )


@pytest.mark.parametrize("stale_in", [0, 1])
def test_an_index_says_which_file_a_tensor_is_read_from(folders, tmp_path, stale_in):
    folder = edited(folders["llama"][0], tmp_path)
    with safe_open(folder / "model.safetensors", "np") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    (folder / "model.safetensors").unlink()
    names = sorted(stored)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    files = [f"model-{n}-of-2.safetensors" for n in (1, 2)]
    for number, part in enumerate(parts):
        stale = {k: stored[k] * -1 for k in parts[1 - number][:3]} if number == stale_in else {}
        save_file({k: stored[k] for k in part} | stale, folder / files[number])
    weight_map = {k: file for file, part in zip(files, parts, strict=True) for k in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    source = safetensors.open_source(folder)
    assert all(np.array_equal(source.tensor(name), stored[name]) for name in names)
    wrong = weight_map | {names[-1]: files[0]}
    index.write_text(json.dumps({"weight_map": wrong}))
    if stale_in == 0 and names[-1] in parts[1][:3]:
        return
    with pytest.raises(DataError, match=f"{names[-1]} is not in {files[0]}, as it says"):
        safetensors.open_source(folder)


def test_sliding_window_layers_are_read_from_either_form_of_config(folders, tmp_path):
    folder = folders["qwen3"][0]
    assert safetensors.open_source(folder).model.pattern == ("full", "window")
    changes = {"layer_types": None, "max_window_layers": 3}
    source = safetensors.open_source(edited(folder, tmp_path, **changes))
    assert source.model.pattern == ("full", "full", "full", "window")
    source = safetensors.open_source(edited(folder, tmp_path, use_sliding_window=False))
    assert source.model.pattern == ("full",)


def test_absent_sliding_window_of_mistral_is_an_error(folders, tmp_path):
    config = folders["mistral"][0] / "config.json"
    values = {k: v for k, v in json.loads(config.read_text()).items() if k != "sliding_window"}
    with pytest.raises(DataError, match="has no sliding_window"):
        families.read_config(values, "config.json")
    _, model, _ = families.read_config(values | {"sliding_window": None}, "config.json")
    assert model.pattern == ("full",)


def test_balance_loss_weight_is_scaled_by_top_k(folders):
    config = json.loads((folders["mixtral"][0] / "config.json").read_text())
    assert config["router_aux_loss_coef"] == pytest.approx(0.01)
    _, model, _ = families.read_config(config | {"router_aux_loss_coef": 0.03}, "config.json")
    assert model.moe.balance_loss == pytest.approx(0.06)


def test_nearest_family_of_the_error_is_a_readable_one():
    with pytest.raises(MismatchError, match="nearest, llama, differs"):
        families.family_of(replace(LLAMA, logit_soft_cap=30.0))


def test_older_rope_keys_are_read_alike(folders, tmp_path):
    new = json.loads((folders["llama"][0] / "config.json").read_text())["rope_parameters"]
    old = {k: v for k, v in new.items() if k not in ("rope_theta", "rope_type")}
    changes = {
        "rope_parameters": None,
        "rope_theta": new["rope_theta"],
        "rope_scaling": old | {"type": "llama3"},
    }
    source = safetensors.open_source(edited(folders["llama"][0], tmp_path, **changes))
    assert source.model.rope == MODELS["llama"].rope
    both = changes | {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}
    source = safetensors.open_source(edited(folders["llama"][0], tmp_path, **both))
    assert source.model.rope == MODELS["llama"].rope
    source = safetensors.open_source(
        edited(folders["llama"][0], tmp_path, **both, original_max_position_embeddings=7)
    )
    assert source.model.rope == replace(MODELS["llama"].rope, original_context=7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope": RopeConfig(fraction=0.5)}, "fraction=0.5"),
        ({"linear_bias": True, "qk_norm": True}, "qk_norm"),
        ({"logit_soft_cap": 30.0}, "logit_soft_cap"),
        ({"positions": "none"}, "positions"),
        ({"pattern": ("window", "full"), "window": 4}, "pattern"),
        ({"moe": MoeConfig(experts=4, shared=1)}, "shared=1"),
    ],
)
def test_model_of_no_family_is_an_error_with_the_differing_fields(changes, message):
    with pytest.raises(MismatchError, match="no Hugging Face architecture") as error:
        families.family_of(replace(LLAMA, **changes))
    assert any(message in line for line in error.value.differences)


@pytest.mark.parametrize(
    ("beside", "lacks"),
    [
        ({}, None),
        ({"tokenizer_config.json": {"eos_token": "</s>"}}, None),
        ({"tokenizer_config.json": {"eos_token": {"content": "<|im_end|>"}}}, "'<|im_end|>'"),
        ({"added_tokens.json": {"<|im_start|>": 270}}, "'<|im_start|>'"),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"270": {"content": "<|x|>"}}}},
            "'<|x|>'",
        ),
    ],
)
def test_a_sentencepiece_model_that_lacks_declared_tokens_is_refused(tmp_path, beside, lacks):
    cfg = TokenizerConfig(vocab_size=270)
    train_sentencepiece(["a few words of text\n" * 99], cfg).save(tmp_path)
    for name, values in beside.items():
        (tmp_path / name).write_text(json.dumps(values))
    said = []
    source = SimpleNamespace(folder=tmp_path, model=replace(LLAMA, vocab_size=300))
    tokenizer = read_tokenizer.tokenizer_of(source, said.append)
    assert (tokenizer is None) == (lacks is not None)
    if lacks:
        assert f"tokenizer.model lacks {lacks}, which other files declare" in said[0]


def test_a_folder_with_gpt2s_files_alone_has_its_tokenizer(tmp_path: Path) -> None:
    vocab = {letter: i for i, letter in enumerate(byte_letters())} | {"ab": 256}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {"<|endoftext|>": 257}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    source = SimpleNamespace(folder=tmp_path, model=ModelConfig(vocab_size=258))
    tokenizer = read_tokenizer.tokenizer_of(source, print)
    assert tokenizer is not None
    assert tokenizer.encode("abc") == [256, vocab["c"]]
    assert tokenizer.eos_id == 257
    made = load_model.tokenizer_config(tokenizer, str(tmp_path))
    assert tokenizers.make(made, ()).fingerprint == tokenizer.fingerprint
