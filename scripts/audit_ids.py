"""What the token ids of an audit file must hold: scripts/audit.py without the numbers. NumPy alone.

One step has B queries with n candidates each; the target of a context is the candidate that it leaves out.
"""

import collections
import difflib
from typing import Any

import numpy as np

Ids = list[int]


def ragged(array: np.ndarray, depth: int) -> Any:
    """Nested lists of ids without padding; `depth` leading axes stay."""
    return [ragged(a, depth - 1) for a in array] if depth else [int(t) for t in array if t >= 0]


class Step:
    """One step: settings, arrays, ids as lists, and which parts of the work it must hold."""

    def __init__(self, config: dict, arrays: dict[str, np.ndarray]):
        self.config, self.arrays = config, arrays
        self.algorithm = a = {k.split(".")[1]: v for k, v in config.items() if k.startswith("algorithm.")}
        self.rewards = arrays["rewards"].astype(np.float64)
        self.B, self.n = B, n = self.rewards.shape
        self.prompts = ragged(arrays["prompt_ids"], 1)
        self.candidates = ragged(arrays["candidate_ids"], 2)
        self.integrated = ragged(arrays["integrated_ids"], 2)
        self.contexts = ragged(arrays["context_ids"], 3)
        self.rollouts = ragged(arrays["rollout_ids"], 4)
        self.T = arrays["candidate_ids"].shape[-1]
        self.mask = np.array([[np.arange(self.T) < len(c) for c in group] for group in self.candidates], np.float64)
        self.limit = config["rollout.max_new_tokens"]
        self.M, self.R = min(a["rollout_tokens"] or self.limit, self.limit), a["rollouts"] or n
        swap = a["sampling"] == "swap"
        self.L = a["integrated"] or (n - 1 if swap else n)
        factor = np.full(B, a["causal_factor"] != "none") & (self.rewards.max(1) > self.rewards.min(1))
        projection = factor & (a["causal_factor"] == "projection")
        is_target = (arrays["klc_weight"] > 0) & (a["kappa"] > 0)
        self.factor_groups = np.nonzero(factor)[0]
        self.listed = np.nonzero(factor | is_target.any(1))[0]  # queries with contexts
        self.kl_targets = list(zip(*np.nonzero(is_target), strict=True))
        self.with_contexts = list(zip(*np.nonzero(is_target | projection[:, None]), strict=True))
        self.with_rollouts = [(b, i) for b in np.nonzero(projection)[0] for i in range(n) if a["correction"] != "zero"]
        # A context of target i: (its other candidate left out, its integrated output), weight in x, weight in Φ.
        self.weights = np.zeros((2, B, n, arrays["context_ids"].shape[2]))
        for b, i in self.with_contexts:
            if swap:
                self.weights[0, b, i, : self.L] = self.weights[1, b, i, self.L :] = 1 / self.L
            else:
                self.weights[0, b, i, 0], self.weights[1, b, i] = 1, 1 / self.L

    def recipe(self, i: int, c: int) -> tuple[set[int], int]:
        """(candidates left out, integrated output shown) of context c of target i."""
        if self.algorithm["sampling"] == "shared":
            return {i}, c
        k = (i + 1 + c % self.L) % self.n
        return {i, k}, k if c < self.L else i


def check_ids(s: Step, tokenizer, end_ids: set[int]) -> dict[str, list[str]]:
    """Faults by line: what token ids must hold and do not."""
    a, n = s.algorithm, s.n
    faults: dict[str, list[str]] = collections.defaultdict(list)

    def need(ok, line: str, message: str) -> None:
        faults[line] += [] if ok else [message]

    def ended(line: str, name: str, ids: Ids, limit: int) -> None:
        ends = [k for k, t in enumerate(ids) if t in end_ids]
        ok = 0 < len(ids) <= limit and (ends == [len(ids) - 1] or (not ends and len(ids) == limit))
        need(ok, line, f"{name}: {len(ids)} tokens of at most {limit}, end ids at {ends}")

    quoted = [[quote(s, tokenizer, end_ids, c) for c in group] for group in s.candidates]
    order = ragged(s.arrays["order"], 1)
    features = ragged(s.arrays["feature_ids"], 2)
    k = (a["kl_targets"] or n) if a["kappa"] > 0 else 0
    outputs_each = n if a["sampling"] == "swap" else s.L
    for b in range(s.B):
        for i in range(n):
            ended("candidate_ids", f"candidate {b},{i}", s.candidates[b][i], s.limit)
            represented = s.candidates[b][i][-s.M :] if b in s.factor_groups else []
            need(features[b][i] == represented, "feature_ids", f"{b},{i}: not the last {s.M} ids of the candidate")
        weight = s.arrays["klc_weight"][b]
        right = (weight > 0).sum() == k and np.allclose(weight[weight != 0], n / max(k, 1))
        need(right, "klc_weight", f"query {b}: {weight.tolist()} is not {n}/{k} at {k} targets")
        present = [m for m in range(n) if quoted[b][m]] if b in s.listed else []
        right = sorted(order[b]) == present and (s.config["contexts.permute"] or order[b] == present)
        need(right, "order", f"query {b}: {order[b]} does not list {present}")
        outputs = [u for u in s.integrated[b] if u]
        wanted = outputs_each if b in s.listed else 0
        need(len(outputs) == wanted, "integrated_ids", f"query {b}: {len(outputs)} integrated outputs, not {wanted}")
        for m, u in enumerate(outputs):
            ended("integrated_ids", f"integrated output {b},{m}", u, s.limit)
    for b in range(s.B):
        for i in range(n):
            rolled = [r for c in s.rollouts[b][i] for r in c if r]
            wanted = s.R * len(s.contexts[b][i]) if (b, i) in s.with_rollouts else 0
            need(len(rolled) == wanted, "rollout_ids", f"{b},{i}: {len(rolled)} roll-outs, not {wanted}")
            for r in rolled:
                ended("rollout_ids", f"a roll-out of {b},{i}", r, s.M)
            count = sum(map(bool, s.contexts[b][i]))
            wanted = s.weights.shape[-1] if (b, i) in s.with_contexts else 0
            need(count == wanted, "context_ids", f"{b},{i}: {count} contexts, not {wanted}")

    rows = []
    for b, i in s.with_contexts:
        for c, ids in enumerate(s.contexts[b][i]):
            left_out, shown = s.recipe(i, c)
            u = s.integrated[b][shown] if shown < len(s.integrated[b]) else []
            parts = [quoted[b][m] for m in order[b] if m not in left_out] + [quote(s, tokenizer, end_ids, u)]
            rows.append(((b, i), f"context {c} of {b},{i}", ids, parts))
    check_contexts(s, tokenizer, quoted, rows, need, "context_ids")
    if a["causal_factor"] == "bayes":
        bayes_ids, rows = ragged(s.arrays["bayes_ids"], 3), []
        for b, i, m in np.ndindex(s.B, n, n):
            ids = bayes_ids[b][i][m]
            need(bool(ids) == (b in s.factor_groups), "bayes_ids", f"{b},{i},{m}: {len(ids)} tokens")
            if ids:
                parts = [q for k in order[b] if (q := quoted[b][m if k == i else k])]
                rows.append(((b, None), f"{b},{i},{m}", ids, parts))
        check_contexts(s, tokenizer, quoted, rows, need, "bayes_ids")
    return faults


def quote(s: Step, tokenizer, end_ids: set[int], completion: Ids) -> Ids:
    """What of a completion stands in a context: without end ids, after </think> by setting, the last `cap` ids."""
    ids = list(completion)
    while ids and ids[-1] in end_ids:
        ids.pop()
    if s.config["contexts.text"] != "full":
        marks = tokenizer.decode(ids).count("</think>")
        if not marks and s.config["contexts.text"] == "answer":
            return []
        if marks:
            # The shortest beginning whose text has every mark ends where the answer begins.
            ends = (k for k in range(len(ids) + 1) if tokenizer.decode(ids[:k]).count("</think>") == marks)
            ids = ids[next(ends) :]
    return ids[-s.config["contexts.cap"] :]


def check_contexts(s: Step, tokenizer, quoted, rows, need, line: str) -> None:
    """Each row (target, name, ids, parts): ids must be a head with the query, then the parts, each with a separator."""
    own = own_tokens(s.prompts)
    by_count = collections.defaultdict(list)
    for row in rows:
        by_count[len(row[3])].append(row)
    for group in by_count.values():
        # Separators are the same everywhere; where that fails, query by query tells who is at fault.
        explained = [(group, explain(group))]
        if explained[0][1] is None:
            queries = sorted({target[0] for target, *_ in group})
            parts = [[row for row in group if row[0][0] == b] for b in queries]
            explained = [(part, explain(part)) for part in parts]
            if all(found for _, found in explained):
                need(False, line, "separators differ between queries")
        heads = {part[0][0][0]: found[0] for part, found in explained if found}
        for part, found in explained:
            for (b, i), name, ids, listed in part:
                need(found, line, f"{name}: not the query and the parts listed, in order, between separators")
                head = found[0][b] if found else ids
                need(holds_query(own[b], s.prompts[b], head, tokenizer), f"{line}/query", f"{name}: not its query")
                if i is None or not (target := quoted[b][i]):
                    continue
                elsewhere = [s.prompts[b], *(h for q, h in heads.items() if q != b)] + ([] if found else listed)
                places = [head] + (found[1] if found and len({t for t, *_ in part}) == 1 else [])
                leak = any(contains(x, target) for x in places) and not any(contains(x, target) for x in elsewhere)
                need(not leak, f"{line}/target", f"{name}: holds its target candidate")


def explain(rows) -> tuple[dict[int, Ids], list[Ids]] | None:
    """({query: head}, separators) with ids = head + part_1 + s_1 + ... + part_m + s_m in every row; else None."""
    tried = set()

    def walk(ends: list[int], separators: list[Ids]):
        left = len(rows[0][3]) - len(separators)
        if not left:
            heads = {}
            same = all(heads.setdefault(t[0], ids[:e]) == ids[:e] for (t, _, ids, _), e in zip(rows, ends, strict=True))
            return (heads, separators) if same and min(ends) > 0 else None
        if (left, ends[0]) in tried:
            return None
        tried.add((left, ends[0]))
        for size in range(1, min(ends) + 1):
            if len({ids[e - size] for (_, _, ids, _), e in zip(rows, ends, strict=True)}) > 1:
                return None
            starts = [e - size - len(parts[left - 1]) for (*_, parts), e in zip(rows, ends, strict=True)]
            if all(
                start >= 0 and ids[start : e - size] == parts[left - 1]
                for (_, _, ids, parts), start, e in zip(rows, starts, ends, strict=True)
            ):
                separator = rows[0][2][ends[0] - size : ends[0]]
                if found := walk(starts, [separator, *separators]):
                    return found
        return None

    return walk([len(ids) for _, _, ids, _ in rows], [])


def own_tokens(prompts: list[Ids]) -> list[Ids]:
    """Each prompt without what all share at its ends; all empty where there is one distinct prompt only."""
    if len({tuple(p) for p in prompts}) == 1:
        return [[] for _ in prompts]
    short = min(map(len, prompts))
    front = next(k for k in range(short + 1) if k == short or len({p[k] for p in prompts}) > 1)
    back = next(k for k in range(short + 1) if k == short - front or len({p[-1 - k] for p in prompts}) > 1)
    return [p[front : len(p) - back] for p in prompts]


def holds_query(own: Ids, prompt: Ids, context: Ids, tokenizer) -> bool:
    """Does a context hold the query? Its first and last token may have merged with a template's text."""
    if not own:
        match = difflib.SequenceMatcher(None, prompt, context, autojunk=False).find_longest_match()
        return 2 * match.size >= len(prompt)
    if contains(context, own):
        return True
    return contains(context, own[1:-1]) and tokenizer.decode(own).strip() in tokenizer.decode(context)


def contains(ids: Ids, run: Ids) -> bool:
    """Is `run` a contiguous part of `ids`?"""
    return any(ids[k : k + len(run)] == run for k in range(len(ids) - len(run) + 1))
