"""One step's experience: candidates, integrated outputs, leave-one-out contexts, roll-outs, causal factors.

B queries, n candidates y_0..y_{n-1} of each, K integrated outputs, C contexts of a target candidate, R roll-outs of
a context, T tokens of a completion, D model width. Everything ragged stays in lists of ids; learner.batch pads it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gcpo_jax import causal, models, objectives, scorer, tasks
from gcpo_jax.batching import InBlocks, Prompt
from gcpo_jax.config import Config
from gcpo_jax.contexts import ContextBuilder, Ids
from gcpo_jax.metrics import Timers
from gcpo_jax.sampler import Samples, sample

Target = tuple[int, int]  # (query b, candidate i)


@dataclasses.dataclass(frozen=True)
class Context:
    """One leave-one-out context of a target, and its weight in the estimates of E[f | x_i] and of Φ."""

    ids: Ids | InBlocks
    weight_x: float
    weight_phi: float


@dataclasses.dataclass
class Experience:
    """What a step saw. Arrays are [B, n] unless said otherwise."""

    rows: list[dict[str, Any]]
    prompts: list[Ids]
    candidates: Samples
    texts: list[list[str]]
    finished: np.ndarray
    rewards: np.ndarray
    advantages: np.ndarray
    upsilon: np.ndarray
    scaled_advantages: np.ndarray
    active: np.ndarray  # [B] bool: rewards differ inside the group
    integrated: list[list[Ids]]
    integrated_rewards: list[list[float]]
    order: list[list[int]]  # of each query: its candidates as its contexts list them
    contexts: dict[Target, list[Context]]
    bayes_contexts: dict[Target, list[Ids | InBlocks]]  # candidate k in slot i of the integration context, k = 0..n-1
    rollouts: dict[Target, list[list[Ids]]]
    features: list[list[Ids]]  # the tokens fed to represent each candidate
    z: np.ndarray  # [B, n, D], as z_x and z_phi
    z_x: np.ndarray
    z_phi: np.ndarray
    klc_weight: np.ndarray  # n/k for the k targets of KL', else 0
    effective_samples: float | None  # of the Bayes weights


@dataclasses.dataclass(frozen=True)
class Actor:
    """The policy that samples: its parameters, and how prompts are made for it."""

    config: Config
    model_config: models.ModelConfig
    params: dict
    contexts: ContextBuilder

    @property
    def blocked(self) -> bool:
        """Whether all contexts of a query share what stands in them (contexts.attention)."""
        return self.config.contexts.attention == "block"

    def sample(
        self,
        prompts: Sequence[Prompt],
        n: int,
        max_new_tokens: int,
        key,
        done=None,
        *,
        alike: int = 1,
        per_query: int = 1,
    ) -> Samples:
        """n completions of each prompt at the run's temperature, top-k and top-p; the rest: see sampler.sample."""
        rollout = self.config.rollout
        return sample(
            self.model_config,
            self.params,
            prompts,
            key=key,
            n=n,
            max_new_tokens=max_new_tokens,
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            eos_ids=self.model_config.eos_ids,
            max_rows=rollout.max_rows,
            done=done,
            alike=alike,
            per_query=per_query,
        )

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Ids], width: int, *, alike: int = 1, per_query: int = 1
    ) -> np.ndarray:
        """log π(completion | prompt) token by token, [R, width]; alike, per_query: see scorer.score."""
        rollout = self.config.rollout
        return scorer.score(
            self.model_config,
            self.params,
            prompts,
            completions,
            width=width,
            temperature=rollout.temperature,
            max_rows=rollout.max_rows,
            alike=alike,
            per_query=per_query,
        )

    def last_hidden(self, sequences: Sequence[Ids]) -> np.ndarray:
        """z of each sequence, [R, D]."""
        return scorer.last_hidden(self.model_config, self.params, sequences, max_rows=self.config.rollout.max_rows)

    def decode(self, completions: Sequence[Ids], skip_special: bool = True) -> list[str]:
        """Text of completions, without special tokens unless they are asked for."""
        return [self.contexts.tokenizer.decode(ids, skip_special_tokens=skip_special) for ids in completions]


def collect(
    actor: Actor, reward: tasks.Reward, rows: Sequence[dict[str, Any]], step: int, timers: Timers, repeat: int = 0
) -> Experience:
    """Lines 5 to 11 of the paper's Algorithm 1 for one batch of problems.

    Rewards are graded beside the device's work where the reward has a batch form: `time/reward_s` is what the step
    waits for them, `time/reward_busy_s` what they take.

    Args:
      step: updates done so far; with the run's seed it fixes every random choice here.
      repeat: other than 0, the same candidates with other integrated outputs, contexts and roll-outs.

    Raises:
      tasks.RewardError: naming the row whose reward raised or is no finite number.
    """
    with tasks.Grading(reward) as grading:
        exp = _collect(actor, grading, rows, step, timers, repeat)
    timers.add("reward_busy", grading.seconds)
    return exp


def _collect(actor: Actor, grading: tasks.Grading, rows, step: int, timers: Timers, repeat: int) -> Experience:
    config, a = actor.config, actor.config.algorithm
    B, n = len(rows), config.rollout.group_size
    key = jax.random.fold_in(jax.random.key(config.train.seed), step)
    rng = np.random.default_rng([config.train.seed, step] + ([repeat] if repeat else []))
    keys = {name: jax.random.fold_in(key, k) for k, name in enumerate(("candidates", "integrated", "rollouts"))}
    if repeat:
        keys |= {name: jax.random.fold_in(keys[name], repeat) for name in ("integrated", "rollouts")}

    texts: list[list[str]] = [[] for _ in rows]
    with timers("sample"):
        prompts = [actor.contexts.query(row["problem"]) for row in rows]
        questions = [actor.contexts.tokenizer.decode(prompt) for prompt in prompts]

        def done(b: int, group: list[Ids]) -> None:
            texts[b] = actor.decode(group)
            grading.add(b, questions[b], texts[b], rows[b])

        candidates = actor.sample(prompts, n, config.rollout.max_new_tokens, keys["candidates"], done)
    with timers("reward"):
        graded = grading.wait()
        rewards = np.stack([graded[b] for b in range(B)]).astype(np.float32)
    advantages = np.asarray(objectives.group_advantages(rewards, scale=a.advantage_scale))
    active = rewards.max(1) > rewards.min(1)
    exp = Experience(
        rows=list(rows),
        prompts=prompts,
        candidates=candidates,
        texts=texts,
        finished=np.array([[c[-1] in actor.model_config.eos_ids for c in group] for group in candidates.tokens]),
        rewards=rewards,
        advantages=advantages,
        upsilon=np.ones((B, n), np.float32),
        scaled_advantages=advantages,
        active=active,
        integrated=[[] for _ in rows],
        integrated_rewards=[[] for _ in rows],
        order=[[] for _ in rows],
        contexts={},
        bayes_contexts={},
        rollouts={},
        features=[[] for _ in rows],
        **{z: np.zeros((B, n, actor.model_config.hidden_size), np.float32) for z in ("z", "z_x", "z_phi")},
        klc_weight=np.zeros((B, n), np.float32),
        effective_samples=None,
    )
    if a.kappa == 0 and a.causal_factor == "none":
        return exp

    if a.kappa > 0:
        k = a.kl_targets or n
        for b in range(B):
            exp.klc_weight[b, rng.permutation(n)[:k]] = n / k
    # A group of equal rewards has zero advantages: its causal factors could not change anything, so none is computed.
    factor_groups = [b for b in range(B) if active[b]] if a.causal_factor != "none" else []
    order = [rng.permutation(n) if config.contexts.permute else np.arange(n) for _ in rows]
    with timers("integrate"):
        needed = [b for b in range(B) if b in factor_groups or exp.klc_weight[b].any()]
        lists = _integrate(actor, exp, order, needed, keys["integrated"])
        for b in needed:
            grading.add(b, questions[b], actor.decode(exp.integrated[b]), rows[b])
    with timers("contexts"):
        with_rollouts = factor_groups if a.causal_factor == "projection" else []
        for b in needed:
            for i in range(n):
                if b in with_rollouts or exp.klc_weight[b, i]:
                    exp.contexts[b, i] = _contexts(actor, exp, lists[b], b, i)
        targets = [(b, i) for b in with_rollouts for i in range(n)]
        M = min(a.rollout_tokens or config.rollout.max_new_tokens, config.rollout.max_new_tokens)
        if targets and a.correction != "zero":
            R = a.rollouts or n
            flat = [c.ids for t in targets for c in exp.contexts[t]]
            alike = per_query = len(flat) // len(with_rollouts)
            if not actor.blocked:
                # With shared sampling the contexts of a target differ in the integrated output at their end alone.
                alike = alike // n if a.sampling == "shared" else 1
            outputs = iter(actor.sample(flat, R, M, keys["rollouts"], alike=alike, per_query=per_query).tokens)
            exp.rollouts = {t: [next(outputs) for _ in exp.contexts[t]] for t in targets}
    with timers("score"):
        if factor_groups:
            _causal_factors(actor, exp, lists, factor_groups, M, rng)
    with timers("reward"):
        for b, values in grading.wait().items():
            exp.integrated_rewards[b] = values.tolist()
    exp.scaled_advantages = exp.advantages * exp.upsilon
    return exp


@dataclasses.dataclass(frozen=True)
class _Listing:
    """The candidates of one query as they stand in its contexts: those with something to quote, in this order."""

    order: list[int]
    quoted: dict[int, Ids]

    def without(self, *left_out: int) -> list[Ids]:
        return [self.quoted[k] for k in self.order if k not in left_out]


def _integrate(actor, exp, order, needed, key) -> dict[int, _Listing]:
    """Sample the integrated outputs: L of one context ("shared"), or u_k of all candidates but k ("swap")."""
    a, n = actor.config.algorithm, actor.config.rollout.group_size
    lists = {}
    for b in needed:
        quoted = {k: actor.contexts.quote(exp.candidates.tokens[b][k]) for k in range(n)}
        lists[b] = _Listing([int(k) for k in order[b] if quoted[int(k)]], quoted)
        exp.order[b] = lists[b].order
    problem = {b: exp.rows[b]["problem"] for b in needed}
    T = actor.config.rollout.max_new_tokens
    if a.sampling == "shared":
        prompts = [actor.contexts.integrate(problem[b], lists[b].without()) for b in needed]
        for b, outputs in zip(needed, actor.sample(prompts, a.integrated or n, T, key).tokens, strict=True):
            exp.integrated[b] = outputs
    else:
        prompts = [actor.contexts.integrate(problem[b], lists[b].without(k)) for b in needed for k in range(n)]
        outputs = actor.sample(prompts, 1, T, key, alike=n if actor.blocked else 1, per_query=n).tokens
        for at, b in enumerate(needed):
            exp.integrated[b] = [o[0] for o in outputs[at * n : (at + 1) * n]]
    return lists


def _contexts(actor, exp, listing, b, i) -> list[Context]:
    a, n = actor.config.algorithm, actor.config.rollout.group_size
    problem = exp.rows[b]["problem"]

    def context(left_out, integrated, weight_x, weight_phi):
        quoted = actor.contexts.quote(exp.integrated[b][integrated])
        ids = actor.contexts.leave_one_out(problem, listing.without(*left_out), quoted)
        return Context(ids, weight_x, weight_phi)

    if a.sampling == "shared":
        # x_{i,l}: the first integrated output is y_n itself, so its context is also the one of x_i.
        L = len(exp.integrated[b])
        return [context((i,), m, float(m == 0), 1 / L) for m in range(L)]
    # Swap: u_k has seen y_i, u_i has seen y_k in its place; neither candidate is listed. Given the rest, the two are
    # exchangeable, so u_i's contexts average to Φ of u_k's.
    partners = [(i + 1 + m) % n for m in range(a.integrated or n - 1)]
    L = len(partners)
    return [context((i, k), k, 1 / L, 0.0) for k in partners] + [context((i, k), i, 0.0, 1 / L) for k in partners]


def _causal_factors(actor, exp, lists, groups, M, rng) -> None:
    """Fill z, z_x, z_phi and Υ (Eq. 11) of the groups whose rewards differ."""
    a, n = actor.config.algorithm, actor.config.rollout.group_size
    for b in groups:
        # Where a roll-out is shorter than a completion, compare its representation with that of an equally long end.
        exp.features[b] = [ids[-M:] for ids in exp.candidates.tokens[b]]
    flat = [exp.features[b][i] for b in groups for i in range(n)]
    outputs = [o for b in groups for i in range(n) for group in exp.rollouts.get((b, i), []) for o in group]
    hidden = actor.last_hidden(flat + outputs)
    D = hidden.shape[1]
    exp.z[groups] = hidden[: len(flat)].reshape(len(groups), n, D)
    at = len(flat)
    if a.causal_factor == "bayes":
        _bayes(actor, exp, lists, groups)
    elif exp.rollouts:
        for b in groups:
            for i in range(n):
                contexts, rolled = exp.contexts[b, i], exp.rollouts[b, i]
                means = hidden[at : at + len(contexts) * len(rolled[0])].reshape(len(contexts), -1, D).mean(1)
                at += len(contexts) * len(rolled[0])
                exp.z_x[b, i] = np.array([c.weight_x for c in contexts], np.float32) @ means
                exp.z_phi[b, i] = np.array([c.weight_phi for c in contexts], np.float32) @ means
    if a.correction == "permuted":
        # The control of the ablation: corrections of the right size that belong to other candidates.
        noise = (exp.z_x - exp.z_phi)[groups].reshape(-1, D)[rng.permutation(len(groups) * n)]
        exp.z_x[groups], exp.z_phi[groups] = noise.reshape(len(groups), n, D), 0.0
    # Of all groups: their number is always the same, that of groups whose rewards differ is not.
    every = np.asarray(_causal_factor(exp.z, exp.z_x, exp.z_phi, alpha=a.alpha, similarity=a.similarity))
    upsilon = every[groups]
    exp.upsilon[groups] = np.maximum(upsilon, 0.0) if a.clip_negative else upsilon


_causal_factor = jax.jit(causal.causal_factor, static_argnames=("alpha", "similarity"))


def _bayes(actor, exp, lists, groups) -> None:
    """E[z | x_i] as a reweighting of the candidates by how well each, in slot i, explains y_n."""
    n = actor.config.rollout.group_size
    prompts, replies, own = [], [], np.eye(n, dtype=bool)
    for b in groups:
        quoted, order = lists[b].quoted, lists[b].order
        listed = actor.contexts.integrate(exp.rows[b]["problem"], lists[b].without())
        prompts.append(listed)  # once, though it is every candidate's with itself in its slot
        for i in range(n):
            swapped = [[quoted[k] if m == i else quoted[m] for m in order] for k in range(n)]
            exp.bayes_contexts[b, i] = [
                listed if k == i else actor.contexts.integrate(exp.rows[b]["problem"], [c for c in cs if c])
                for k, cs in enumerate(swapped)
            ]
            prompts += [c for k, c in enumerate(exp.bayes_contexts[b, i]) if k != i]
        replies += [exp.integrated[b][0]] * (n * (n - 1) + 1)
    per_query = n * (n - 1) + 1
    shared = {"alike": per_query} if actor.blocked else {"per_query": per_query}
    total = actor.score(prompts, replies, max(map(len, replies)), **shared).sum(axis=1).reshape(len(groups), -1)
    loglik = np.zeros((len(groups), n, n), np.float32)
    loglik[:, own], loglik[:, ~own] = total[:, :1], total[:, 1:]
    lengths = np.array([len(exp.integrated[b][0]) for b in groups], np.float32)
    weights, effective = causal.bayes_weights(loglik, lengths)
    exp.z_x[groups] = np.einsum("bik,bkd->bid", np.asarray(weights), exp.z[groups])
    exp.z_phi[groups] = exp.z[groups].mean(1, keepdims=True)  # Φ of the above, were the weights untempered
    exp.effective_samples = float(np.mean(np.asarray(effective)))
