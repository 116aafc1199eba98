"""TRL: what its GRPOTrainer calls to sample, and the trainer itself, in an environment that has trl and torch.

Sampling is transformers' generate with the settings that the trainer gives it (a dynamic key-value cache, compilation
off, no top-k or top-p). The trainer runs in float32 without gradient checkpointing, which are not its defaults but
faster here; it logs, saves and evaluates nothing.
"""

import os
import tempfile
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import torch
import transformers
import trl
import worker

PACKAGES = ("trl", "torch", "transformers")


def sampling(pipe: worker.Pipe, model: Any) -> None:
    """Batches of `rows` rows one after the other."""
    spec = pipe.spec
    config = transformers.GenerationConfig(
        max_new_tokens=spec["new_tokens"],
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        pad_token_id=0,
        eos_token_id=spec["end_ids"],
        disable_compile=True,
    )
    rows = torch.tensor([ids for ids in worker.prompt_ids(spec) for _ in range(spec["samples"])])
    ends = torch.tensor(spec["end_ids"])

    def work(_: int):
        tokens = 0
        for batch in torch.split(rows, spec["rows"]):
            with torch.no_grad():
                out = model.generate(input_ids=batch, attention_mask=torch.ones_like(batch), generation_config=config)
            ended = torch.isin(out[:, batch.shape[1] :], ends).int()
            tokens += int((ended.cumsum(1) - ended == 0).sum())  # up to and with the first end
        return {"tokens": tokens}

    worker.serve(pipe, PACKAGES, work)


class Timed(transformers.TrainerCallback):
    """Waits for "go" before a step and answers after it; the first steps warm up."""

    def __init__(self, pipe: worker.Pipe, warm: int):
        self._pipe, self._warm, self._began = pipe, warm, 0.0

    def on_step_begin(self, args, state, control, **_):
        """Sampling comes after this too."""
        if state.global_step == self._warm:
            self._pipe.ready(*PACKAGES)
        if state.global_step >= self._warm and not self._pipe.wait():
            os._exit(0)  # the driver has what it wants; the trainer has no way to stop before a step
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        """The optimizer has stepped."""
        if state.global_step > self._warm:
            s = self._pipe.spec
            self._pipe.done(time.perf_counter() - self._began, s["prompts"] * s["samples"] * s["new_tokens"])


def step(pipe: worker.Pipe, model: transformers.PreTrainedModel, scratch: str) -> None:
    """One step of GRPOTrainer after the other."""
    spec = pipe.spec
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(spec["directory"])
    # Ids outside the model's vocabulary: never drawn, so every completion has full length.
    tokenizer.add_special_tokens({"eos_token": "<never>"})
    tokenizer.pad_token = "0"
    rows = spec["prompts"] * spec["samples"]
    settings = trl.GRPOConfig(
        output_dir=scratch,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        num_generations=spec["samples"],
        max_completion_length=spec["new_tokens"],
        num_iterations=1,
        beta=spec["beta"],
        loss_type="grpo",
        temperature=1.0,
        learning_rate=1e-6,
        weight_decay=0.01,
        adam_beta2=0.95,
        max_steps=10**6,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )

    def reward(completions, **_):
        return [worker.even_share(text) for text in completions]

    trainer = trl.GRPOTrainer(
        model=model,
        args=settings,
        reward_funcs=reward,
        train_dataset=datasets.Dataset.from_dict({"prompt": [worker.prompt(p) for p in worker.problems(spec)]}),
        processing_class=tokenizer,
        callbacks=[Timed(pipe, warm=3)],
    )
    trainer.train()


def main() -> None:
    """Do what the first line of standard input says."""
    pipe = worker.Pipe()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.Qwen2ForCausalLM.from_pretrained(pipe.spec["directory"], dtype=torch.float32)
    if pipe.spec["work"] == "step":
        with tempfile.TemporaryDirectory() as scratch:
            step(pipe, model, scratch)
    else:
        sampling(pipe, model.eval())


if __name__ == "__main__":
    main()
