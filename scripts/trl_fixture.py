"""Make tests/fixtures/trl.json: losses, gradients and advantages as TRL's own GRPOTrainer computes them.

    pip install "gcpo_jax[trl]" && python scripts/trl_fixture.py

A GRPOTrainer is built on a random two-layer model. Its advantages come from its own generate-and-score step with a
reward function that returns fixed numbers; its losses from its own _compute_loss, with the one method that runs the
model replaced by fixed log-probs, so that the gradient with respect to each of them can be read off. One process.
"""

import json
import pathlib
import tempfile

import datasets
import tokenizers
import torch
import transformers
import trl

FIXTURE = pathlib.Path(__file__).parents[1] / "tests" / "fixtures" / "trl.json"
GROUPS, N, T, CONSTANT = 3, 4, 6, 8
# A mixed group, one with unequal gaps, one without spread.
REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.25, -3.0, 7.5, 0.1], [1.0, 1.0, 1.0, 1.0]]
LENGTHS = [6, 1, 3, 4, 2, 6, 5, 0, 6, 6, 1, 2]  # 0: a truncated completion that is masked out as a whole


def make_trainer(directory: str, loss_type: str, beta: float, scale: str = "group") -> trl.GRPOTrainer:
    """TRL's trainer on a random model, one optimizer step of GROUPS * N completions."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "a": 2, "b": 3}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=4,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        eos_token_id=1,
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return trl.GRPOTrainer(
        model=directory,
        processing_class=tokenizer,
        reward_funcs=lambda prompts, **_: [r for group in REWARDS for r in group],
        train_dataset=datasets.Dataset.from_list([{"prompt": "a b"}] * GROUPS),
        args=trl.GRPOConfig(
            output_dir=directory,
            use_cpu=True,
            bf16=False,
            report_to=[],
            per_device_train_batch_size=GROUPS * N,
            num_generations=N,
            max_completion_length=CONSTANT,
            loss_type=loss_type,
            beta=beta,
            scale_rewards=scale,
            # Its default weighs the KL term by the importance ratio (DeepSeek-V3.2); Eq. 6 does not.
            use_bias_correction_kl=False,
        ),
    )


def loss_and_gradient(trainer: trl.GRPOTrainer, case: dict, old: bool, parts: int = 1) -> dict:
    """The loss of TRL on fixed log-probs, in `parts` accumulated micro-batches, and its gradient."""
    mask = torch.tensor(case["mask"])
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = parts
    trainer.model.train()
    total, gradient, rows = 0.0, [], GROUPS * N // parts
    for start in range(0, GROUPS * N, rows):
        part = slice(start, start + rows)
        logp = torch.tensor(case["logp"][part], requires_grad=True)
        trainer._get_per_token_logps_and_entropies = lambda *_, logp=logp, **__: (logp, torch.zeros_like(logp), None)
        inputs = {
            "prompt_ids": torch.full((rows, 1), 2),
            "prompt_mask": torch.ones((rows, 1), dtype=torch.long),
            "completion_ids": torch.full((rows, T), 2),
            "completion_mask": mask[part],
            "advantages": torch.tensor(case["advantages"]["group"][part]),
            "ref_per_token_logps": torch.tensor(case["ref_logp"][part]),
            "num_items_in_batch": mask.sum(),
        }
        if old:
            inputs["old_per_token_logps"] = torch.tensor(case["old_logp"][part])
        loss = trainer._compute_loss(trainer.model, inputs)
        gradient += torch.autograd.grad(loss, logp)[0].tolist()
        total += float(loss.detach())
    return {"loss": total, "gradient": gradient}


def main() -> None:
    """Write the fixture."""
    generator = torch.Generator().manual_seed(7)

    def noise(scale):
        return scale * torch.randn(GROUPS * N, T, generator=generator)

    logp = -noise(1.5).abs()
    case = {
        "versions": {"trl": trl.__version__, "torch": torch.__version__.split("+")[0]},
        "constant": CONSTANT,
        "rewards": REWARDS,
        "logp": logp.tolist(),
        # Wide enough that both sides of the clip are reached, with either sign of the advantage.
        "old_logp": (logp + noise(0.3)).tolist(),
        "ref_logp": (logp + noise(0.7)).tolist(),
        "mask": [[int(t < length) for t in range(T)] for length in LENGTHS],
        "advantages": {},
        "cases": [],
    }
    for scale in ("group", "none"):
        with tempfile.TemporaryDirectory() as directory:
            trainer = make_trainer(directory, "grpo", 0.0, scale)
            batch = trainer._generate_and_score_completions([{"prompt": "a b"} for _ in range(GROUPS * N)])
            case["advantages"][scale] = batch["advantages"].tolist()
    for loss_type in ("grpo", "dr_grpo", "bnpo", "dapo"):
        for beta in (0.0, 0.04):
            with tempfile.TemporaryDirectory() as directory:
                trainer = make_trainer(directory, loss_type, beta)
                for old, parts in ((False, 1), (True, 1), (True, 2)):
                    if parts == 1 or loss_type != "bnpo":  # bnpo's mean is over a micro-batch: it depends on the cut
                        result = loss_and_gradient(trainer, case, old, parts)
                        case["cases"].append(
                            {"loss_type": loss_type, "beta": beta, "old": old, "parts": parts, **result}
                        )
    FIXTURE.parent.mkdir(exist_ok=True)
    FIXTURE.write_text(json.dumps(case) + "\n")


if __name__ == "__main__":
    main()
