"""The mistakes that `tests/mutants.py` makes: a name, the text as it stands, what is put in its place, and the tests
that must notice it (as few as do).

To add one: a text that stands once under hooks/ and interp/, best a line that will outlive a move to another file, and
a test that fails with it. One that lives asks for an assertion; one that changes no result is no mistake.
"""

STATS, RESULTS = "tests/test_stats.py", "tests/test_results.py"
RANDOM, INPUTS, STREAM = "tests/hooks/test_random.py", "tests/hooks/test_inputs.py", "tests/interp/test_streaming.py"
ROWS = "tests/interp/test_metrics.py::test_answers_of_each_row_when_rows_are_run_one_at_a_time[gpt2-left]"
METRICS, SWEEPS = "tests/interp/test_metrics.py::test_", "tests/interp/test_sweeps.py::test_"
RANKS, ANSWERS = METRICS + "rank_and_accuracy[gpt2-left]", METRICS + "log_prob_and_prob[gpt2-left]"
ATTENTION = "tests/hooks/test_attention.py::test_"
SCALES = ATTENTION + "scores_scaled_by_something_else_than_the_width_of_a_head"
ELSEWHERE = "tests/hooks/test_padding.py::test_positions_of_a_source_that_is_padded_on_the_other_side"
DRAWS = "tests/hooks/test_padding.py::test_random_interventions[shared-gpt2]"
CONSTANTS = "tests/hooks/test_gradients.py::test_a_world_that_is_read_with_and_without_its_gradient"
FORMULAS = "tests/hooks/test_interventions.py::test_the_builders_do_what_their_formulas_say[gpt2-right]"
MEANS = "tests/hooks/test_reference_sets.py::test_"
PATTERNS = "tests/hooks/test_patterns.py::test_queries_and_keys_by_hand"
RECORDS = "tests/hooks/test_apply_training.py::test_like_interventions_of_a_function_have_a_record_each"
COUNTS = "tests/hooks/test_audit.py::test_the_audit_says_how_many_rows_and_positions[gpt2]"
ABSENT = SWEEPS + "ragged_rows[left-gpt2]"
FLOOR = SWEEPS + "the_noise_floor_is_the_largest_change_without_an_edit"
GRIDS = "tests/interp/test_grids.py"
LENS = "tests/interp/test_lens.py::test_"
FIRST_ORDER = "tests/interp/test_attribution.py::test_"
PARTS = "tests/hooks/test_strength.py::test_"
CALLS = "tests/hooks/test_calls.py::test_"
AGAIN = CALLS + "what_checkpointing_computes_again_is_of_its_own_call"
CERTIFICATE = "tests/hooks/test_certificate.py::test_"
CHUNKS = "tests/hooks/test_executors.py::test_"
DECODING, WAYS = "tests/hooks/test_generation.py::test_", "tests/hooks/test_generation_modes.py::test_"
BY_HAND = "tests/hooks/test_generation_by_hand.py::test_"
REPORTS, CACHES = "tests/hooks/test_generation_reports.py::test_", "tests/hooks/test_generation_caches.py::test_"
OPTIONS = "tests/hooks/test_generation_ways.py::test_"
DEBIASED, REFERENCE = "tests/attention/test_decoding.py::test_", "tests/attention/test_reference.py::test_"

CAP = "    if cap is not None:\n        scores = softcap(scores, cap)\n"
BIAS = "    if bias is not None:\n        scores = scores + bias\n"

MUTANTS = [
    # Statistics
    (
        "a mean over rows that lack the cell",
        "    count = np.asarray(present.sum(axis=-1))\n",
        "    count = np.full(present.shape[:-1], present.shape[-1])\n",
        STATS,
    ),
    ("a p-value of one tail", "(np.abs(x @ signs) >= least[:, None])", "(x @ signs >= least[:, None])", STATS),
    ("no tolerance for ties", " - 1e-12 * np.abs(x).sum(axis=1)", "", STATS),
    ("a drawn p without its plus one", "else (extreme + 1) / (seen + 1)", "else extreme / seen", STATS),
    ("signs drawn where all could be seen", "rows <= n_perm.bit_length() - 1", "rows < n_perm.bit_length() - 1", STATS),
    ("false discoveries counted from zero", "np.arange(1, tested.size + 1)", "np.arange(tested.size)", STATS),
    ("an interval of one tail", "((1 - level) / 2, (1 + level) / 2)", "(1 - level, level)", STATS),
    ("an interval of one row", "(present.sum(axis=1) >= 2)", "(present.sum(axis=1) >= 1)", STATS),
    (
        "a ratio over rows that lack the cell",
        "(weight @ times if everywhere else bottom @ times)",
        "(weight @ times)",
        STATS,
    ),
    (
        "quantiles of the draws one off",
        "(~np.isnan(values)).sum(axis=1) - 1, 0",
        "(~np.isnan(values)).sum(axis=1) - 2, 0",
        STATS,
    ),
    # Results
    (
        "a family of hypotheses for each metric",
        "        return stats.benjamini_hochberg(self.p_values(n_perm, seed), q)\n",
        "        p = self.p_values(n_perm, seed)\n"
        "        families = p if self.several else [p]\n"
        "        return np.stack([stats.benjamini_hochberg(one, q) for one in families]).reshape(p.shape)\n",
        RESULTS,
    ),
    (
        "one floor of noise for all metrics",
        "self.noise_floor.reshape(self.noise_floor.shape + (1,) * len(self.axes))",
        "self.noise_floor.max()",
        RESULTS,
    ),
    (
        "only positive effects above noise",
        "return np.abs(mean) > self.noise_floor",
        "return mean > self.noise_floor",
        RESULTS,
    ),
    (
        "a share of rows that lack the cell",
        "reach = stats.row_mean(np.broadcast_to(difference, effect.shape), present)",
        "reach = np.full(effect.shape[:-1], size)",
        RESULTS,
    ),
    (
        "rows masked by their own size",
        "(np.abs(difference) >= tol * size)",
        "(np.abs(difference) >= tol * np.abs(difference))",
        RESULTS,
    ),
    ("the largest cells by sign", "np.lexsort((-np.abs(mean)", "np.lexsort((-mean", RESULTS),
    (
        "the noise of the average row",
        "np.abs(values[:, 1] - base).max(1)",
        "np.abs(values[:, 1] - base).mean(1)",
        FLOOR,
    ),
    (
        "no noise floor from rounding",
        ", rounding * np.abs(base).max(1))",
        ", 0 * np.abs(base).max(1))",
        FLOOR,
    ),
    (
        "rows that lack the cell have effect 0",
        "    effect[:, absent] = np.nan\n",
        "    effect[:, absent] = 0.0\n",
        ABSENT,
    ),
    ("a cell pruned only where every row has it", "(code == 2) | absent", "code == 2", ABSENT),
    (
        "directions exchanged",
        'denoising = direction == "denoising"',
        'denoising = direction == "noising"',
        SWEEPS + "both_ends[gpt2]",
    ),
    # Metrics
    (
        "the divergence of the other from the run",
        "theirs.exp() * (theirs - ours))",
        "ours.exp() * (ours - theirs))",
        METRICS + "kl[gpt2-left]",
    ),
    ("ties rank lower", "(logits > best)", "(logits >= best)", RANKS),
    (
        "the rank of the worst answer",
        "best = logits.gather(2, chosen).amax(2",
        "best = logits.gather(2, chosen).amin(2",
        RANKS,
    ),
    (
        "only the first answer counts",
        "[rows].to(logits.device)[:, None]).any(2)",
        "[rows].to(logits.device)[:, None])[..., 0]",
        RANKS,
    ),
    ("alternatives multiply", "found = found.logsumexp(1)", "found = found.sum(1)", ANSWERS),
    (
        "the mean over an answer's tokens",
        "return torch.where(real, each, 0).sum(1)",
        "return torch.where(real, each, 0).mean(1)",
        ANSWERS,
    ),
    (
        "as many foils as answers",
        "x[..., self.width :].mean(2)",
        "x[..., self.width : 2 * self.width].mean(2)",
        METRICS + "logit_and_logit_diff[gpt2-left]",
    ),
    (
        "a loss of the padding",
        "torch.arange(most) < (inputs.lengths - 1)[:, None]",
        "torch.arange(most) < inputs.lengths[:, None]",
        METRICS + "cross_entropy[gpt2-left]",
    ),
    (
        "the loss of all columns",
        "torch.where(counts, loss, 0).sum(1) / counts.sum(1)",
        "torch.where(counts, loss, 0).mean(1)",
        METRICS + "cross_entropy[gpt2-left]",
    ),
    (
        "a mean over positions of the widest row",
        "torch.where(counts, x, 0).sum(1) / counts.sum(1)",
        "torch.where(counts, x, 0).mean(1)",
        METRICS + "positions_that_are_more_in_some_rows_than_in_others[gpt2-left]",
    ),
    (
        "half precision kept",
        'differences that matter."""\n    return x.to(torch.promote_types(x.dtype, torch.float32))',
        'differences that matter."""\n    return x',
        METRICS + "metrics_of_a_world_and_of_half_precision",
    ),
    (
        "answers of the first rows: rank",
        "chosen = self.chosen[rows].to(logits.device)[:, None].expand",
        "chosen = self.chosen[: len(logits)].to(logits.device)[:, None].expand",
        ROWS,
    ),
    (
        "answers of the first rows: log_prob",
        ".log_softmax(-1).gather(1, self.chosen[rows].to",
        ".log_softmax(-1).gather(1, self.chosen[: len(logits)].to",
        ROWS,
    ),
    (
        "answers of the first rows: accuracy",
        "(top == self.chosen[rows].to",
        "(top == self.chosen[: len(logits)].to",
        ROWS,
    ),
    (
        "tokens of the first rows",
        "chosen, counts = self.target[rows].to",
        "chosen, counts = self.target[: len(logits)].to",
        ROWS,
    ),
    (
        "positions of the first rows",
        "counts = self.real[rows].to(x.device)",
        "counts = self.real[: len(x)].to(x.device)",
        ROWS,
    ),
    (
        "references of the first rows",
        "others = [o[chunk.rows] for o in other]",
        "others = [o[: chunk.rows.stop - chunk.rows.start] for o in other]",
        ROWS,
    ),
    # Grids
    (
        "groups counted from the end of the widest row",
        "at = torch.where(listed < 0, listed + lengths, listed)",
        "at = torch.where(listed < 0, listed + inputs.width, listed)",
        GRIDS,
    ),
    ("no first token from the end", "(listed >= -lengths)).all(1)", "(listed > -lengths)).all(1)", GRIDS),
    ("a group that a row has in part", "(listed >= -lengths)).all(1)", "(listed >= -lengths)).any(1)", GRIDS),
    (
        "positions by column",
        "cols = torch.argsort((~tokens.real).byte(), dim=1, stable=True).gather(1, at)",
        "cols = at",
        ABSENT,
    ),
    (
        "labels of the first row only",
        "for row in rows if -len(row) <= value < len(row)))",
        "for row in rows[:1]))",
        GRIDS,
    ),
    # First order, and the lens
    (
        "gradients at the edited value",
        "gradient == 0, 0, new - mine[site])",
        "gradient == 0, 0, new)",
        FIRST_ORDER + "the_gradient_times_the_change[gpt2-left]",
    ),
    (
        "references of the first rows, first order",
        "*(r[window] for r in reference)]",
        "*(r[: window.stop - window.start] for r in reference)]",
        FIRST_ORDER + "chunks_of_rows_change_nothing",
    ),
    (
        "the first token's gradient",
        "* change).flatten(1).sum(1).to",
        "* change)[:, 0].flatten(1).sum(1).to",
        FIRST_ORDER + "the_gradient_times_the_change[gpt2-left]",
    ),
    (
        "a variance about zero",
        "middle = _centered(whole.to(wide)) if centered else whole.to(wide)",
        "middle = whole.to(wide)",
        LENS + "components_by_hand_and_their_sum[gpt2-left-1]",
    ),
    (
        "a norm's gain without its eps",
        "* (1 + eps) ** 0.5",
        "* 1.0",
        LENS + "components_by_hand_and_their_sum[llama-left-1]",
    ),
    (
        "the lens at a column",
        "column = int(self.inputs.order[row, pos % length])",
        "column = pos % length",
        LENS + "the_likeliest_tokens_at_each_point[gpt2-left]",
    ),
    (
        "the sum of several answers",
        "[tokens.to(weight.device)].mean(1)",
        "[tokens.to(weight.device)].sum(1)",
        LENS + "answers_of_each_row_and_of_several_tokens[gpt2]",
    ),
    # Resuming
    (
        "a cell of which one row is done",
        "np.flatnonzero(~self.done.all(1))",
        "np.flatnonzero(~self.done.any(1))",
        STREAM,
    ),
    ("all rows done with one", "self.done[at, rows] = True", "self.done[at] = True", STREAM),
    (
        "skipped where one row is done",
        "bool(known[todo[i], rows].all())",
        "bool(known[todo[i], rows].any())",
        STREAM,
    ),
    ("resumed with other buffers", "    yield from model.module.named_buffers()\n", "", STREAM),
    ("resumed with another seed", '"seed": str(seed),\n        "executor"', '"seed": "",\n        "executor"', STREAM),
    ("resumed on other inputs", '"inputs": fingerprint(base),', '"inputs": "",', STREAM),
    ("resumed with another reference", "fingerprint(metric.reference)\n", '""\n', STREAM),
    # Random numbers
    ("the last of n is never drawn", "(uniform(*counters) * n)", "(uniform(*counters) * (n - 1))", RANDOM),
    ("radius and angle of one number", "uniform(*counters, 1)).cos()", "uniform(*counters, 0)).cos()", RANDOM),
    ("noise whatever its seed", "normal(ctx.seed, self.seed, ctx.salt", "normal(ctx.seed, ctx.salt", RANDOM),
    ("noise whatever the run's seed", "normal(ctx.seed, self.seed, ctx.salt", "normal(self.seed, ctx.salt", RANDOM),
    (
        "the same noise everywhere",
        "normal(ctx.seed, self.seed, ctx.salt, *ctx",
        "normal(ctx.seed, self.seed, *ctx",
        RANDOM,
    ),
    (
        "a donor whatever its seed",
        "choice(len(reads[0]), ctx.seed, self.seed, ctx.row)",
        "choice(len(reads[0]), ctx.seed, ctx.row)",
        RANDOM,
    ),
    (
        "a donor by the row's place",
        "ctx.seed, self.seed, ctx.row)",
        "ctx.seed, self.seed, torch.arange(len(x)))",
        DRAWS,
    ),
    # Interventions
    ("directions of any length", "(wide / wide.norm())[None]", "wide[None]", FORMULAS),
    (
        "directions at any angle",
        "torch.linalg.qr(wide.T)[0].T.to(x.dtype)",
        "torch.nn.functional.normalize(wide, dim=-1).to(x.dtype)",
        FORMULAS,
    ),
    (
        "an interchange that adds",
        "x + ((reads[0] - x) @ basis.T) @ basis",
        "x + (reads[0] @ basis.T) @ basis",
        FORMULAS,
    ),
    (
        "a mean over rows that lack the position",
        "real.sum(dims, keepdim=True).clamp_min(1)",
        "len(reference)",
        MEANS + "means_over_a_reference_set[left-gpt2]",
    ),
    ("a constant that is none", "return reads[0].detach().expand_as(x)", "return reads[0].expand_as(x)", CONSTANTS),
    (
        "attention back from the first token that can",
        "torch.where(query >= self.offset,",
        "torch.where(query > self.offset,",
        PATTERNS,
    ),
    (
        "a forbidden key one off",
        "key == query - self.offset)[:, None], -torch.inf",
        "key == query - self.offset + 1)[:, None], -torch.inf",
        PATTERNS,
    ),
    (
        "queries taken for the first",
        "return ctx.pos[:, :, None], ctx.key_pos[:, None, :]",
        "return ctx.key_pos[:, :, None], ctx.key_pos[:, None, :]",
        PATTERNS,
    ),
    ("the second mask alone", "mask = one & two if", "mask = two if", PARTS + "where_and_at[gpt2]"),
    (
        "the second strength alone",
        "weight=s if plain else self.weight * s)",
        "weight=s)",
        PARTS + "strength_is_linear_in_between[gpt2]",
    ),
    (
        "a parameter of the first rows",
        "value = value[ctx.window]",
        "value = value[: len(x)]",
        CHUNKS + "what_is_given_for_each_row_in_chunks",
    ),
    (
        "a strength of the first rows",
        "weight = weight[window].reshape",
        "weight = weight[: len(x)].reshape",
        CHUNKS + "what_is_given_for_each_row_in_chunks",
    ),
    (
        "a row of the first rows' tensor",
        "return self.layout.of_rows(source)[self.window], region",
        "return self.layout.of_rows(source)[: region.shape[ROW]], region",
        CHUNKS + "what_is_given_for_each_row_in_chunks",
    ),
    # Positions
    (
        "a batch's rows are numbered anew",
        "row_ids=self.row_ids[index]",
        "row_ids=self.row_ids[: len(self.row_ids[index])]",
        INPUTS + " " + CHUNKS + "random_interventions_draw_the_same_in_every_chunk",
    ),
    (
        "rows that differ in their padding",
        "return Alignment(clean, corrupt, (a != b).any(-1) & real)",
        "return Alignment(clean, corrupt, (a != b).any(-1))",
        INPUTS,
    ),
    ("where equal rows first differ", "torch.where(never, self.clean.lengths,", "torch.where(never, 0,", INPUTS),
    (
        "spans counted from the widest row's end",
        "return lengths + value if value < 0",
        "return lengths.max() + value if value < 0",
        "tests/hooks/test_region.py",
    ),
    (
        "positions of a source by column",
        "found[axis], there = source.find(wanted)",
        "found[axis], there = wanted, source.find(wanted)[1]",
        ELSEWHERE,
    ),
    (
        "positions of a source as here",
        "found[axis], _ = columns_of(axis, index, source, None, site)",
        "found[axis] = cols",
        ELSEWHERE,
    ),
    (
        "draws by column",
        "pos=on(queries.index[window].gather(1, region.cols))",
        "pos=on(region.cols)",
        DRAWS,
    ),
    # Attention
    ("a kernel's own scale", "scale=attention.scaling, is_causal=causal", "is_causal=causal", SCALES),
    (
        "a cap on what is added",
        CAP + BIAS,
        BIAS + CAP,
        ATTENTION + "scores_are_capped_before_anything_is_added_to_them",
    ),
    (
        "nothing is dropped",
        "    if dropout:\n        pattern =",
        "    if False:\n        pattern =",
        ATTENTION + "the_pattern_that_is_seen_is_the_one_before_dropout",
    ),
    (
        "key/value heads in turn",
        "k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)",
        "k, v = k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1)",
        SCALES,
    ),
    (
        "a window one wider",
        "(key > own - window))[None, None]",
        "(key >= own - window))[None, None]",
        "tests/hooks/test_adapters.py::test_masks_that_do_not_tell_the_window",
    ),
    # The record
    ("one record for like interventions", "same.pop(0) if same", "same[0] if same", RECORDS),
    ("every row touched", "int(marks.any(1).sum()), int(marks.sum())", "len(marks), int(marks.sum())", COUNTS),
    (
        "the last change for the largest",
        "self._sizes = [torch.stack([torch.as_tensor(size) for size in self._sizes]).amax()]",
        "self._sizes = [self._sizes[-1]]",
        "tests/hooks/test_audit.py::test_the_largest_change_of_many_calls",
    ),
    (
        "pruned although it was applied",
        "self.pruned = other.pruned and (fresh or self.pruned)",
        "self.pruned = other.pruned",
        "tests/hooks/test_audit.py::test_what_fired_once_is_not_pruned",
    ),
    # Whose call it is, and what a model is made of
    (
        "a call within a call is the user's",
        "elif not nested and self.start",
        "elif self.start",
        CALLS + "a_function_that_runs_the_model[held-call]",
    ),
    (
        "an ended call goes on",
        "while _CALLS.stack and not _stands(_CALLS.stack[-1].stood):",
        "while False:",
        CALLS + "an_interrupt_within_a_call_and_calls_after_it",
    ),
    (
        "a call that is made twice writes twice",
        "    twin = copied(memo)\n",
        "    twin = cache\n",
        CALLS + "a_call_that_is_made_twice_writes_once_into_the_callers_cache",
    ),
    (
        "parts are computed again without their pass",
        "return self._recompute(function, inner, named)",
        "return function(*inner, **named)",
        AGAIN + "[sites-nothing-False]",
    ),
    (
        "parts are computed again without what was read",
        "[()] * len(self.programs), here=self.states)",
        "[()] * len(self.programs))",
        AGAIN + "[here-nothing-False]",
    ),
    (
        "a copy keeps its hooks",
        "        return Hook()\n\n    def __reduce__",
        "        return self\n\n    def __reduce__",
        CALLS + "copies_that_are_made_under_a_plan[gpt2]",
    ),
    (
        "one seed for all that is held",
        "seeds + (one.seed,) * len(part)",
        "seeds + (self.holds[-1].seed,) * len(part)",
        CALLS + "each_plan_keeps_its_own_seed",
    ),
    (
        "a description that is made once",
        "        if now == self._fingerprint:\n",
        "        if self._fingerprint is not None:\n",
        "tests/hooks/test_worlds.py::test_blocks_that_were_taken_away_after_wrapping",
    ),
    (
        "nobody looks inside for a certificate",
        "    if not _near(inside, truth[0], network.dtype):",
        "    if False:",
        CERTIFICATE + "a_description_that_says_something_else_is_refused",
    ),
    (
        "zeros hide what they are multiplied with",
        "gate_of(module).suspended(), noise_for_zeros(module):",
        "gate_of(module).suspended():",
        CERTIFICATE + "a_model_that_does_something_else_is_refused[zero_low_rank_branch]",
    ),
    (
        "a short row in every regime",
        "max([LENGTH, *(bound + 3 for bound in passed)])",
        "LENGTH",
        CERTIFICATE + "a_window_wider_than_the_row_is_passed_where_the_inputs_pass_it",
    ),
    (
        "arguments that nobody understands",
        "if value is not None and name not in known)\n    if odd:",
        "if value is not None and name not in known)\n    if False:",
        "tests/hooks/test_exposed.py",
    ),
    (
        "sinks that mix something in",
        "        pattern = pattern[..., :-1]\n",
        "        pattern = pattern[..., 1:]\n",
        "tests/hooks/test_exposed.py",
    ),
    # Tokens
    (
        "a token that is not there",
        "numbers.gather(1, at) == index",
        "numbers.gather(1, at) >= index",
        "tests/hooks/test_layout.py",
    ),
    (
        "keys of the past out of sight",
        "cols[..., None] + offset",
        "cols[..., None] - 1",
        "tests/hooks/test_executors.py::test_executors_agree",
    ),
    (
        "rows apart whose angles go together",
        "return network.angles_by_length and bool",
        "return False and bool",
        "tests/hooks/test_rotary.py",
    ),
    (
        "a packed window one wider",
        "    allowed = (keys <= own) & real\n"
        "    return allowed if attention.window is None else allowed & (keys > own - attention.window)",
        "    allowed = (keys <= own) & real\n"
        "    return allowed if attention.window is None else allowed & (keys >= own - attention.window)",
        "tests/hooks/test_executors.py::test_executors_agree",
    ),
    (
        "a ban on the keys of another query",
        "product = asking & asked",
        "product = asking | asked",
        "tests/hooks/test_patterns.py",
    ),
    (
        "keys of the base seen beside a world's own",
        "whole & ~changed[:, :, None]",
        "whole",
        "tests/hooks/test_packed_cells.py::test_few_queries_among_many_keys",
    ),
    (
        "what is read is taken to be the base's",
        "changed = region & (others | mine)",
        "changed = region & mine",
        "tests/hooks/test_executors.py::test_worlds_that_share_a_prefix_with_their_source",
    ),
    (
        "worlds that differ stacked as one",
        "return Given(values[0] if alike else torch.stack(values), each=not alike, fitted=True), None",
        "return Given(values[0], each=False, fitted=True), None",
        "tests/hooks/test_packed_cells.py::test_values_that_differ_from_world_to_world",
    ),
    # Decoding
    (
        "a copy of a cache of which nothing is known",
        "        copied(twin)\n        return twin",
        "        return twin",
        REPORTS + "copies_of_the_cache_of_a_prefix",
    ),
    (
        "a copy of a cache that shares the worlds read of it",
        "mirrors = {path: caching.apart(mirror) for path, mirror in self.mirrors.items()}",
        "mirrors = dict(self.mirrors)",
        REPORTS + "copies_of_the_cache_of_a_prefix",
    ),
    (
        "texts in one row that are taken for one",
        "odd = [name for name in _PACKED if call.get(name) is not None]",
        "odd = []",
        CACHES + "what_a_batch_that_was_begun_before_calls_the_model_with_is_refused",
    ),
    (
        "values of the prompt in another text",
        "for item in plan if self.beside else ():",
        "for item in ():",
        OPTIONS + "what_is_of_the_prompt_alone_is_refused_in_a_text_besides",
    ),
    (
        "the prompt's end moves with the text",
        "return Columns(index, self.real, self.lengths, prompt=self.prompt, image=image)",
        "return Columns(index, self.real, self.real.sum(1), prompt=self.prompt, image=image)",
        DECODING + "positions_are_those_of_the_prompt",
    ),
    (
        "a slice goes on after the prompt",
        "(tokens.index < torch.minimum(high, lengths))",
        "(tokens.index < high)",
        DECODING + "positions_are_those_of_the_prompt",
    ),
    (
        "edited keys that do not persist",
        "self._cache.update(self._edit(key_states), value_states, *args, **kwargs)",
        "self._cache.update(key_states, value_states, *args, **kwargs)",
        DECODING + "generation_is_recomputation[llama-greedy]",
    ),
    (
        "caches of worlds that are read are not followed",
        "for mirror in self.mirrors.values():",
        "for mirror in ():",
        BY_HAND + "what_is_done_to_a_cache_between_calls_is_followed",
    ),
    (
        "a static prefill aligned to the lower right",
        "first = keys - queries if first is None else first",
        "first = keys - queries",
        DECODING + "a_static_prefill_has_more_columns_than_tokens[none]",
    ),
    (
        "padding of a finished row that counts",
        "real = real & (torch.arange(width) < self.ended[:, None])",
        "real = real & True",
        WAYS + "padding_that_a_finished_row_is_fed_is_no_token",
    ),
    (
        "tokens that are counted twice",
        "marks[:, : marks.shape[1] if once and counted else max(0, counted - tokens.start)]",
        "marks[:, : 0 * start]",
        WAYS + "prompt_lookup[llama] " + WAYS + "padding_that_a_finished_row_is_fed_is_no_token",
    ),
    (
        "decoding that is compiled without its hooks",
        "lambda own, *args, **kwargs: where().__call__",
        "lambda own, *args, **kwargs: own(*args, **kwargs)",
        WAYS + "decoding_that_is_compiled_by_itself",
    ),
    (
        "tokens in a cache that nobody edits",
        "if not self.past:",
        "if self.past >= 0:",
        BY_HAND + "a_cache_that_was_filled_before[llama]",
    ),
    (
        "calls for guidance that are taken for the generation's",
        "return cache is self.cache",
        "return True",
        WAYS + "guidance_calls_the_model_on_a_text_of_its_own",
    ),
    # Compiled
    (
        "a number that a graph is made for",
        "            elif name in op.numbers:\n",
        "            elif name in op.numbers and False:\n",
        "tests/hooks/test_compile.py::test_new_values_vectors_strengths_positions_heads_and_seeds_are_one_graph[gpt2]",
    ),
    (
        "a gradient that ends at the tap",
        "        return gradient, gradient\n",
        "        return 0 * gradient, gradient\n",
        "tests/hooks/test_compile.py::test_gradients_by_taps_are_those_of_a_plain_run",
    ),
    (
        "a stream that only attention reads",
        '_from_positions(site("resid_pre", layer), source, residual)',
        '_from_positions(site("attn_in", layer), source, residual)',
        "tests/training/test_heads.py::test_a_residual_stream_that_the_first_layer_does_not_reach[small_attn_only]",
    ),
    (
        "members that go on without their moments",
        "{**self.params, **self.moments}.items():\n            value[list(mine)]",
        "self.params.items():\n            value[list(mine)]",
        "tests/training/test_ensemble.py::test_some_members_go_on_without_the_rest",
    ),
    (
        "graphs of before a plan was held",
        "eval_frame.reset_code(code)",
        "eval_frame._debug_get_cache_entry_list(code)",
        "tests/hooks/test_dynamo.py::test_compiled_before_and_called_within[small_attn_only-function]",
    ),
    (
        "members in the order of their groups",
        'torch.cat(found).index_select(0, constants["plans"])',
        "torch.cat(found)",
        "tests/training/test_members.py::test_plans_of_other_structures_and_worlds_that_are_read",
    ),
    # Worlds decoded side by side
    (
        "beams of every world go on from the first one's cache",
        "every = torch.cat([index + world * rows for world in range(len(self))])",
        "every = torch.cat([index for _ in range(len(self))])",
        "tests/hooks/test_fork.py::test_generation_equals_separate_runs[beams]",
    ),
    (
        "one cache for both worlds, in the layers before the last that is edited",
        "first = first if layer < 0 else min(first, layer)",
        "first = first if layer < 0 else layer",
        "tests/hooks/test_joining.py::test_generation_equals_separate_runs[greedy]",
    ),
    (
        "worlds that part in the middle of a text, and go on from one",
        "one.reorder_cache(torch.arange(self._rows[cache]).repeat(len(self)))",
        "one.reorder_cache(torch.arange(self._rows[cache]).repeat_interleave(len(self)))",
        "tests/hooks/test_joining.py::test_an_outer_plan_and_one_that_comes_between_two_steps",
    ),
    (
        "worlds that are one under a graph, which may be computed again",
        "if torch.is_grad_enabled() or network.tool",
        "if network.tool",
        "tests/hooks/test_joining.py::test_where_it_is_not_known_what_blocks_do_with_rows_worlds_are_apart_throughout",
    ),
    (
        "a call within one taken for a part of it",
        "if frames.innermost() is not call:",
        "if False:",
        "tests/hooks/test_joining.py::test_other_calls_within_one_are_not_of_its_worlds",
    ),
    (
        "filler of a region counted as keys",
        "if valid is not None and item.site.name in _NO_KEY:",
        "if False:",
        "tests/attention/test_patterns.py::test_rows_with_fewer_keys_count_no_others",
    ),
    (
        "keys that a window has left counted as another",
        "valid = None if bool(there.all()) else there\n",
        "valid = None\n",
        "tests/attention/test_patterns.py::test_keys_that_a_window_has_left_are_not_counted",
    ),
    (
        "every world under the first one's plan",
        "return [one.holds[number] if isinstance(one, Fork) else one for one in found] if number else found",
        "return found",
        "tests/hooks/test_fork.py::test_generation_equals_separate_runs[greedy]",
    ),
    (
        "reversed weights that are equal divided by nothing",
        "flat = total <= 8 * torch.finfo(x.dtype).eps * mass.abs()",
        "flat = total < 0",
        "tests/attention/test_patterns.py::test_equal_weights_reversed_stay_equal",
    ),
    (
        "a cut-off by the debiased logits",
        "own < own.amax(-1, keepdim=True) + math.log(eps)",
        "z < z.amax(-1, keepdim=True) + math.log(eps)",
        "tests/attention/test_decoding.py::test_the_formula",
    ),
    # The cache
    # Decoding without priors
    (
        "debiased: the sign of g",
        "change = branch if term.added else wide[0] - branch",
        "change = branch if term.added else branch - wide[0]",
        DEBIASED + "the_formula",
    ),
    (
        "debiased: what is added is subtracted",
        "change = branch if term.added else wide[0] - branch",
        "change = wide[0] - branch",
        DEBIASED + "the_formula",
    ),
    (
        "debiased: one sample for their mean",
        "wide[at : at + len(term.branches)].mean(0)",
        "wide[at]",
        DEBIASED + "the_formula",
    ),
    (
        "debiased: the next term's branches are this one's",
        "            at += len(term.branches)\n",
        "            at += 1\n",
        DEBIASED + "the_formula",
    ),
    (
        "debiased: a cut-off of logits times eps",
        "own.amax(-1, keepdim=True) + math.log(eps), -torch.inf)\n\n\n@contextmanager",
        "own.amax(-1, keepdim=True) * eps, -torch.inf)\n\n\n@contextmanager",
        DEBIASED + "the_formula",
    ),
    (
        "debiased: what a branch forbids is amplified",
        "silent = branch.isinf() | wide[0].isinf()",
        "silent = wide[0].isinf()",
        DEBIASED + "half_precision_is_combined_in_single_and_what_a_branch_forbids_says_nothing",
    ),
    (
        "debiased: a gate that looks at the first step for ever",
        "moment.memory[self._name] = self.measure(own[:, -1].detach())",
        "moment.memory.setdefault(self._name, self.measure(own[:, -1].detach()))",
        DEBIASED + "an_intervention_gated_by_the_step_before[1]",
    ),
    (
        "debiased: a gate that looks at what was made of the worlds",
        "gate.keep(wide[0], moment)",
        "gate.keep(z, moment)",
        DEBIASED + "a_gate_looks_at_the_models_own_logits",
    ),
    (
        "debiased: a gate that looks at the first token of a call",
        "moment.memory[self._name] = self.measure(own[:, -1].detach())",
        "moment.memory[self._name] = self.measure(own[:, 0].detach())",
        DEBIASED + "a_gate_looks_at_the_models_own_logits",
    ),
    (
        "debiased: gates stay where beams move",
        "{name: kept[rows.to(kept.device)] for name, kept in self.memory.items()}",
        "{name: kept[: len(rows)] for name, kept in self.memory.items()}",
        "tests/hooks/test_fork.py::test_memory_follows_beams",
    ),
    (
        "debiased: a step too early",
        "step = max(0, fed.text.width - fed.text.prompt)",
        "step = max(0, fed.text.width - fed.text.prompt - 1)",
        "tests/hooks/test_fork.py " + DEBIASED + "a_gate_looks_at_the_models_own_logits",
    ),
    (
        "debiased: draws of patterns alike in all rows",
        "return uniform(ctx.seed, self.seed, ctx.salt, *ctx.counters(x.ndim))",
        "return uniform(ctx.seed, self.seed, ctx.salt, *ctx.counters(x.ndim)[1:])",
        "tests/attention/test_patterns.py",
    ),
    (
        "debiased: draws of patterns by the row's place",
        "given = {ROW: self.row,",
        "given = {ROW: torch.arange(len(self.row)),",
        "tests/attention/test_patterns.py",
    ),
    (
        "debiased: draws of patterns alike in all layers",
        "return uniform(ctx.seed, self.seed, ctx.salt, *ctx.counters(x.ndim))",
        "return uniform(ctx.seed, self.seed, *ctx.counters(x.ndim))",
        "tests/attention/test_patterns.py",
    ),
    (
        "debiased: the pictures of the first world in all",
        "[self._pixels(one, pixels) for one in self.branches]",
        "[self._pixels(self.branches[0], pixels) for _ in self.branches]",
        DEBIASED + "worlds_are_separate_runs_of_the_whole_text",
    ),
    (
        "debiased: other images in place of what fills up a row",
        "return torch.where(there, made, pixels)",
        "return made",
        "tests/attention/test_seeing_families.py::test_worlds_are_separate_runs_of_the_whole_text[tp-smolvlm]",
    ),
    (
        "debiased: a key that has left the window is seen by a decoded token",
        "(window is None or keys <= window)",
        "(window is None or keys <= window + 1)",
        "tests/hooks/test_exposed.py::test_a_decoded_token_that_sees_all_there_is_has_no_mask",
    ),
    (
        "debiased: hidden columns that are seen",
        "real = text.real & ~now",
        "real = text.real",
        "tests/hooks/test_fork.py::test_what_a_world_does_not_see_is_as_if_it_had_not_been_written",
    ),
    (
        "debiased: hidden columns that count as positions",
        "lengths = text.lengths - (text.real & now).sum(1) - later.sum(1)",
        "lengths = text.lengths",
        "tests/hooks/test_fork.py",
    ),
    (
        "debiased: positions in height and width of one world",
        "return value.repeat(1, count, 1)",
        "return value.repeat(count, 1, 1)",
        "tests/attention/test_seeing_families.py::test_worlds_are_separate_runs_of_the_whole_text[l-qwen2_vl]",
    ),
    (
        "debiased: what else a call returns is the last world's",
        "return value[: len(value) // count] if",
        "return value[-(len(value) // count) :] if",
        "tests/hooks/test_fork.py::test_what_else_a_call_returns_is_the_first_worlds",
    ),
    (
        "debiased: a world that is read writes into the caller's cache",
        "mirrors[path] = caching.apart(fed.cache)",
        "mirrors[path] = fed.cache",
        "tests/hooks/test_generation.py",
    ),
    (
        "debiased: an effect is without attention minus with",
        "effect = -np.mean([one.effect for one in found], axis=0)",
        "effect = np.mean([one.effect for one in found], axis=0)",
        "tests/attention/test_effects.py::test_an_effect_is_with_attention_minus_without",
    ),
    (
        "debiased: a head that looks much at the image is gated",
        "low = (some - every).exp() < self.share",
        "low = (some - every).exp() > self.share",
        "tests/attention/test_relatives.py::test_routes_are_turned_down_only_where_the_head_looks_little_at_the_image",
    ),
    (
        "reference: a branch of its own where the cache is shared",
        "return gamma if moment.step == 0 or moment.memory is None else 0.0",
        "return gamma",
        REFERENCE + "with_one_cache_for_both_the_visual_counterfactual_of_later_tokens_is_the_fact",
    ),
    (
        "reference: a token does not attend to itself",
        "past = (keys[:, None] <= ctx.pos",
        "past = (keys[:, None] < ctx.pos",
        REFERENCE + "first_step_logits_are_those_of_the_published_formulas",
    ),
    (
        "reference: draws alike in all images",
        "choice(1 << 31, self.seed, name, at)",
        "choice(1 << 31, self.seed, name)",
        REFERENCE + "first_step_logits_are_those_of_the_published_formulas",
    ),
    (
        "reference: draws by the row's place",
        "self._row(features, attention, int(number), int(name))",
        "self._row(features, attention, int(number), int(number))",
        REFERENCE + "every_family_bears_the_visual_branch_and_its_draws_do_not_depend_on_the_batch[llava]",
    ),
    (
        "reference: a class token among the patches",
        "slice(frame.start + frame.extra, frame.tokens.stop)",
        "slice(frame.start, frame.tokens.stop - frame.extra)",
        REFERENCE + "first_step_logits_are_those_of_the_published_formulas",
    ),
    (
        "a removal that leaves the rest its weights",
        "weight / left.clamp_min(1e-2) * (old - value)",
        "weight * (old - value)",
        "tests/kv/test_effects.py::test_every_unit_equals_a_loop_that_deletes_it[llama]",
    ),
    (
        "a difference of nearly equal numbers",
        "sharp = (left < 1e-2)",
        "sharp = (left < 0)",
        "tests/kv/test_effects.py::test_attention_all_on_one_key",
    ),
    (
        "tokens counted by what is kept of them",
        "before = first.tokens[:, None] if first.is_initialized else 0",
        "before = first.width",
        "tests/kv/test_eviction.py::test_eviction_equals_masking[llama]",
    ),
    (
        "kv: sinks left out of a merge",
        "torch.logaddexp(mass.to(own_mass.dtype), own_mass) - sinks",
        "mass.to(own_mass.dtype) - sinks",
        "tests/kv/test_families.py::test_effects_are_those_of_the_models_own_forward[gpt_oss-post_prefill]",
    ),
    (
        "kv: sinks left out where attention is on one key",
        "None if sinks is None else sinks[heads[sharp], 0]",
        "None",
        "tests/kv/test_families.py::test_sinks_are_counted_once",
    ),
    (
        "kv: sinks left out of what policies see",
        "if sinks is None:\n        return scores.softmax(-1, dtype=wide)",
        "if True:\n        return scores.softmax(-1, dtype=wide)",
        "tests/kv/test_families.py::test_policies_see_the_models_own_attention[None-gpt_oss]",
    ),
    (
        "kv: a window one key too wide",
        "> self.index[:, None, queries, None] - window",
        ">= self.index[:, None, queries, None] - window",
        "tests/kv/test_eviction.py::test_chunks_equal_knockouts[mistral]",
    ),
    (
        "kv: a key leaves a stream one query late",
        "[:, None] >= times",
        "[:, None] > times",
        "tests/kv/test_effects.py::test_a_head_leaves_a_stream_little_by_little[unit0]",
    ),
    (
        "kv: a chunk's last token leaves with the next",
        "min(-(-stop // chunk) * chunk, context)",
        "min(stop // chunk * chunk + chunk, context)",
        "tests/kv/test_effects.py::test_a_head_leaves_a_stream_little_by_little[unit0]",
    ),
    (
        "kv: gates of a stream close for all queries",
        "torch.where(closing, bias[:, :, None], 0.0)",
        "bias",
        "tests/kv/test_gradients.py::test_a_stream_is_integrated",
    ),
    (
        "kv: spans that share tokens leave together",
        "_by_span(units, each.sum(2)) * gone",
        "_by_span(units, each.sum(2)) * gone[:, -1:]",
        "tests/kv/test_gradients.py::test_spans_that_share_tokens_leave_a_stream_each_at_its_time",
    ),
    (
        "kv: rescaling left out",
        "weight = weight / (1 - weight).clamp_min(1e-6)",
        "weight = weight * 1",
        "tests/kv/test_gradients.py::test_estimates_are_near_what_they_estimate",
    ),
    (
        "kv: padding counted as a neighbour",
        "for x in (received * there, there)",
        "for x in (received * there, torch.ones_like(there))",
        "tests/kv/test_misuse.py::test_a_padded_row_keeps_what_it_keeps_alone[SnapKV]",
    ),
    (
        "kv: infinite scores before what is kept in any case",
        "scores.to(torch.float64).clamp(-most, most)",
        "scores.to(torch.float64)",
        "tests/kv/test_misuse.py::test_stabilizers_stay_while_scores_are_infinite",
    ),
    (
        "kv: local tokens without scores",
        "state.keeping, state.prefilling = True, False",
        "state.keeping, state.prefilling, state.policy = True, False, None",
        "tests/kv/test_misuse.py::test_local_tokens_have_scores_of_their_own_while_decoding",
    ),
    (
        "kv: a label with what a head's keys have in common",
        "published.labels - published.labels.mean(-1, keepdim=True)",
        "published.labels - published.labels.mean()",
        "tests/kv/test_heads.py::test_labels",
    ),
    (
        "kv: shares of the two labels swapped",
        "(1 - mix, mix)",
        "(mix, 1 - mix)",
        "tests/kv/test_heads.py::test_one_score_is_trained_on_both_labels",
    ),
    (
        "kv: an oracle that forgets what is gone",
        "cached.model, units, cached.tail, times, range(cached.row.context), cached.measure, bias",
        "cached.model, units, cached.tail, times, range(cached.row.context), cached.measure",
        "tests/kv/test_sets.py::test_the_greedy_oracle_takes_the_least",
    ),
]
