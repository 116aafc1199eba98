"""models/ against transformers and torch on small random checkpoints, both ways."""

import dataclasses
import json
import os
import pathlib

import jax
import numpy as np
import pytest

from gcpo_jax import models, sampler

torch = pytest.importorskip("torch", reason="torch is not installed: pip install gcpo_jax[torch]")
transformers = pytest.importorskip("transformers")

forward = jax.jit(models.forward, static_argnums=0)
VOCABULARY = 96
CASES = {
    # width / heads is 8 everywhere; K is the number of key/value heads.
    "qwen2 K=2": dict(family="qwen2", num_key_value_heads=2),
    "qwen2 tied K=1 head_dim sharded bf16": dict(
        family="qwen2", num_key_value_heads=1, tie_word_embeddings=True, head_dim=12, shard="12KB", dtype="bfloat16"
    ),
    "qwen3 K=4 head_dim sharded fp16": dict(
        family="qwen3", num_key_value_heads=4, head_dim=16, shard="12KB", dtype="float16"
    ),
    "qwen3 tied K=2 head_dim": dict(family="qwen3", num_key_value_heads=2, tie_word_embeddings=True, head_dim=6),
    "llama K=1 bf16": dict(family="llama", num_key_value_heads=1, dtype="bfloat16", rope_theta=500.0),
    "llama tied K=4 sharded": dict(family="llama", num_key_value_heads=4, tie_word_embeddings=True, shard="12KB"),
}


def write_tokenizer(directory: pathlib.Path) -> None:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as token_models

    vocabulary = {t: k for k, t in enumerate(["<pad>", "<end>", *(f"w{k}" for k in range(VOCABULARY - 2))])}
    core = Tokenizer(token_models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} <end> {% endfor %}"
    tokenizer.save_pretrained(directory)


def reference_outputs(directory: pathlib.Path, tokens: np.ndarray):
    """(model, logits, hidden states after the final norm) of transformers in float32, nothing left out of the files."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with torch.no_grad():
        out = model.eval()(torch.tensor(tokens, dtype=torch.long), output_hidden_states=True)
    return model, out.logits.numpy(), out.hidden_states[-1].numpy()


@dataclasses.dataclass
class Case:
    directory: pathlib.Path
    tokens: np.ndarray
    reference: transformers.PreTrainedModel
    logits: np.ndarray
    hidden: np.ndarray
    config: models.ModelConfig
    params: dict


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def case(request, tmp_path_factory) -> Case:
    settings = dict(request.param)
    family, dtype, shard = (settings.pop(k, d) for k, d in (("family", ""), ("dtype", "float32"), ("shard", "1GB")))
    theta = settings.pop("rope_theta", 10_000.0)
    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4
    )
    sizes |= dict(eos_token_id=1, pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": theta})
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **sizes | settings))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # Random norms and biases too: at their defaults of 1 and 0 a mistake in either would not show.
            p.copy_(torch.randn_like(p) * 0.2 + float("norm" in name))
    directory = tmp_path_factory.mktemp(family)
    model.generation_config.eos_token_id = [1, 5]
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=shard)
    write_tokenizer(directory)
    assert (len(list(directory.glob("*.safetensors"))) > 2) == (shard != "1GB")
    tokens = np.random.default_rng(0).integers(2, VOCABULARY, (3, 11)).astype(np.int32)
    return Case(directory, tokens, *reference_outputs(directory, tokens), *models.load_pretrained(directory))


def test_logits_and_hidden_states_equal_those_of_transformers(case):
    lengths = np.full(len(case.tokens), case.tokens.shape[1], np.int32)
    logits, hidden = forward(case.config, case.params, case.tokens, lengths)
    np.testing.assert_allclose(logits, case.logits, atol=3e-4)
    np.testing.assert_allclose(hidden, case.hidden, atol=3e-4)
    assert case.config.eos_ids == (1, 5)


def test_greedy_tokens_equal_those_of_transformers(case):
    prompts = case.tokens.tolist()
    ours = sampler.generate(
        case.config, case.params, prompts, max_new_tokens=16, temperature=0.0, eos_ids=case.config.eos_ids
    )
    with torch.no_grad():
        theirs = case.reference.generate(
            torch.tensor(case.tokens, dtype=torch.long), do_sample=False, max_new_tokens=16
        )
    for [(mine, _)], other in zip(ours, theirs[:, case.tokens.shape[1] :].tolist(), strict=True):
        assert mine == other[: len(mine)]
        assert len(mine) == 16 or mine[-1] in case.config.eos_ids


def test_transformers_reads_what_save_pretrained_writes(case, tmp_path):
    out = tmp_path / "policy"
    models.save_pretrained(out, case.config, case.params, source=case.directory, max_shard_bytes=20_000)
    model, logits, hidden = reference_outputs(out, case.tokens)
    np.testing.assert_allclose(logits, case.logits, atol=1e-6)
    np.testing.assert_allclose(hidden, case.hidden, atol=1e-6)
    tied = case.config.tied_embeddings
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied
    assert model.config.eos_token_id == [1, 5] and model.config.pad_token_id == 0
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert generation.to_dict() == transformers.GenerationConfig.from_pretrained(case.directory).to_dict()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    source = transformers.AutoTokenizer.from_pretrained(case.directory)
    assert tokenizer.encode("w3 <end> w93") == source.encode("w3 <end> w93")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "w0"}], tokenize=False)
    assert (chat, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("w0 <end> ", 1, 0)
    again, params = models.load_pretrained(out)
    assert again == case.config
    jax.tree.map(np.testing.assert_array_equal, params, case.params)


def test_old_key_names_load_to_the_same_model(case, tmp_path):
    for file in case.directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = json.loads((tmp_path / "config.json").read_text())
    theta = content.pop("rope_parameters")["rope_theta"]
    content["torch_dtype"] = content.pop("dtype")
    content.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(content | {"rope_theta": theta, "rope_scaling": None}))
    assert models.read_config(tmp_path) == case.config


@pytest.mark.slow
@pytest.mark.skipif("GCPO_SMOLLM2" not in os.environ, reason="GCPO_SMOLLM2 names no directory of SmolLM2-135M-Instruct")
def test_smollm2_equals_transformers(tmp_path):
    directory = pathlib.Path(os.environ["GCPO_SMOLLM2"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    chat = [{"role": "user", "content": "What is seven times eight? Answer with a number."}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    tokens = np.array([tokenizer.encode(text, add_special_tokens=False)], np.int32)
    reference, logits, hidden = reference_outputs(directory, tokens)
    config, params = models.load_pretrained(directory)
    ours = forward(config, params, tokens, np.full(1, tokens.shape[1], np.int32))
    np.testing.assert_allclose(ours[0], logits, atol=2e-3)
    np.testing.assert_allclose(ours[1], hidden, atol=2e-3)
    with torch.no_grad():
        theirs = reference.generate(torch.tensor(tokens, dtype=torch.long), do_sample=False, max_new_tokens=12)
    [[(greedy, _)]] = sampler.generate(
        config, params, tokens.tolist(), max_new_tokens=12, temperature=0.0, eos_ids=config.eos_ids
    )
    assert greedy == theirs[0, tokens.shape[1] :].tolist()
    models.save_pretrained(tmp_path / "m", config, params, source=directory)
    np.testing.assert_allclose(reference_outputs(tmp_path / "m", tokens)[1], logits, atol=1e-5)
