"""Proof that the tests can fail: plants one bug at a time in a copy of the tree and checks that the tests named for it do.

    python tests/planted_bugs.py            # all of them, about ten minutes; not part of pytest
    python tests/planted_bugs.py surgery    # those whose line holds the word
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

# file | what is there | what is planted | tests that must fail (pytest's -k, within a file)
BUGS = [
    ("kernels/project.py", "torch.sub(g, u, alpha=k)", "torch.add(g, u, alpha=k)", "test_surgery.py", "never_opposes"),
    ("kernels/project.py", "torch.sub(g, u, alpha=k)", "torch.sub(g, u, alpha=2 * k)", "test_surgery.py", "projecting_twice or formula"),
    ("kernels/project.py", "return without(g, u, gu / uu if gu < 0 < uu else 0.0)", "return without(g, u, gu / uu if uu else 0.0)", "test_surgery.py", "left_alone"),
    ("kernels/project.py", "return d if 1e-20 < abs(d) < 1e30 else", "return d if True else", "test_surgery.py", "tiny or scale_of_the_previous or formula"),
    ("kernels/project.py", "if abs(k) < 1e30 else", "if True else", "test_surgery.py", "leaves_float32s_range"),
    ("kernels/project.py", "torch.sub(g, u, alpha=k)", "torch.sub(g, u, alpha=k) + 1e-3", "test_surgery.py", "linear_in_the_scale"),
    ("surgery.py", "shares * c.clamp_max(0)", "shares * c", "test_surgery.py", "per_teacher"),
    ("surgery.py", "torch.where(uu > 0, (shares * c.clamp_max(0)).sum() / uu, 0.0)", "(shares * c.clamp_max(0)).sum() / uu", "test_surgery.py", "against_no_previous"),
    ("surgery.py", "torch.as_tensor(changed, device=g.device)", "torch.tensor(True)", "test_surgery.py", "switch"),
    ("surgery.py", "return g, BETA * u + (1 - BETA) * g", "return g, g", "test_surgery.py", "average_remembers"),
    ("surgery.py", "gi = project(gi, g[j]) if j != i else gi", "gi = gi", "test_surgery.py", "pcgrad"),
    ("curriculum.py", "(1 - FLOOR) * w / w.sum() + FLOOR / len(w)", "w / w.sum() + FLOOR / len(w)", "test_curriculum.py", "distribution"),
    ("curriculum.py", "(1 - FLOOR) * w / w.sum() + FLOOR / len(w)", "w / w.sum()", "test_curriculum.py", "left_out"),
    ("curriculum.py", "(top > 0, (d / top) ** power", "(top > 0, (top / d) ** power", "test_curriculum.py", "farther or twice_as_far"),
    ("curriculum.py", "(top > 0, (d / top) ** power", "(top > 0, torch.exp(d / top)", "test_curriculum.py", "power_zero or twice_as_far"),
    ("curriculum.py", "(d == top).int().argmax()", "(d == top).int().flip(0).argmax()", "test_curriculum.py", "infinite_power or ties"),
    ("curriculum.py", "    if bad:", "    if False:", "test_curriculum.py", "nan"),
    ("curriculum.py", "step % len(checked(d))", "step // 2 % len(checked(d))", "test_curriculum.py", "fixed_visits"),
    ("curriculum.py", "w = w.clamp_min(1e-6) * (eta", "w = (eta", "test_curriculum.py", "dro_accumulates"),
    ("curriculum.py", "/ d.mean().clamp_min(torch.finfo(d.dtype).tiny)", "", "test_curriculum.py", "scale_of_the_distances"),
    ("kernels/kl.py", "if direction == \"forward\":", "if direction == \"reverse\":", "test_kernels.py", "torch_distributions"),
    ("kernels/kl.py", "* temperature**2 + sigma_floor", "* temperature + sigma_floor", "test_kernels.py", "torch_distributions"),
    ("kernels/kl.py", "x - torch.log1p(x)", "x + torch.log1p(x)", "test_kernels.py", "never_negative or torch_distributions"),
    ("kernels/kl.py", "~(mask[..., None] & real(x.shape[-1], task, act_dims))", "~mask[..., None]", "test_kernels.py", "padding_changes_nothing"),
    ("kernels/kl.py", "x = x / (A if", "x = x / (1 if", "test_kernels.py", "divides_by"),
    ("kernels/attention.py", ".tril()[keep] & mask[:, None])", ".tril(1)[keep] & mask[:, None])", "test_kernels.py", "loop_over_rows"),
    ("kernels/attention.py", "p.masked_fill_(~valid.repeat_interleave(n_head, 0), 0.0)", "pass", "test_kernels.py", "without_any_valid_token"),
    ("kernels/attention.py", ".tril()[keep] & mask[:, None])", ".tril(1)[keep] & mask[:, None])", "test_model.py", "future"),
    ("kernels/attention.py", ".tril()[keep] & mask[:, None])", ".tril()[keep] & mask[:, None].any())", "test_kernels.py", "loop_over_rows"),
    ("kernels/attention.py", "dq[:, :, ctx.keep] = torch.bmm(ds, k)", "dq[:, :, ctx.keep] = torch.bmm(ds, v)", "test_kernels.py", "attention_is_as_exact"),
    ("kernels/attention.py", "torch.zeros_like(qkv) if ctx.keep != EVERY else torch.empty_like(qkv)", "torch.ones_like(qkv)", "test_kernels.py", "attention_is_as_exact"),
    ("kernels/attention.py", "tp, used = p * (ts - (p * ts).sum(-1, keepdim=True)), p", "tp, used = p * ts, p", "test_kernels.py", "attention_is_as_exact"),
    ("kernels/attention.py", "dp, used = dp * factors, p * factors", "dp, used = dp * factors, p", "test_kernels.py", "drops_the_same"),
    ("kernels/attention.py", "min(round((1 - p) * 2**16), 2**16 - 1) - 2**15", "round((1 - p) * 2**15)", "test_kernels.py", "factors_are_drawn"),
    ("kernels/attention.py", "min(round((1 - p) * 2**16), 2**16 - 1)", "round((1 - p) * 2**16)", "test_kernels.py", "hardly_any_dropout"),
    ("kernels/kl.py", "(torch.zeros(N, device=dev) for _ in range(3))", "torch.zeros(3, N, device=dev)", "test_distill.py", "with_the_kernels"),
    ("run.py", "lambda kept=f: graph.replay()", "graph.replay", "test_distill.py", "captured"),
    ("kernels/attention.py", "seed, n_head, dropout)[0][:, keep]", "seed, n_head, dropout)[0][:, : len(range(T)[keep])]", "test_kernels.py", "attention_is_as_exact"),
    ("kernels/attention.py", "ds = (w * (dw - tl.sum(w * dw, 1)[:, None])", "ds = (w * (dw - tl.sum(dw, 1)[:, None])", "test_kernels.py", "attention_is_as_exact"),
    ("kernels/attention.py", "tw = w * (ts - tl.sum(w * ts, 1)[:, None])", "tw = w * ts", "test_kernels.py", "attention_is_as_exact"),
    ("kernels/attention.py", "tw = w * (ts - along[:, None])", "tw = w * ts", "test_kernels.py", "attention_is_as_exact"),
    ("kernels/attention.py", "total = total * shrink + tl.sum(e, 1)", "total = total + tl.sum(e, 1)", "test_kernels.py", "attention_is_as_exact"),
    ("kernels/attention.py", "dw *= _kept(seed, pair, here, j, T, p)", "dw *= _kept(seed, pair, j, here, T, p)", "test_kernels.py", "drops_the_same"),
    ("kernels/attention.py", "return tl.where(r < p, 0.0, 1.0 / (1.0 - p))", "return tl.where(r < p, 0.0, 1.0)", "test_kernels.py", "keeps_the_mean"),
    ("kernels/kl.py", "counted = valid[:, None] & (a < size)[None, :]", "counted = valid[:, None] & (a < A)[None, :]", "test_kernels.py", "kl_kernel"),
    ("kernels/kl.py", "q2 * (1 / 13 + q2 / 15)", "q2 * (1 / 3 + q2 / 15)", "test_kernels.py", "kl_kernel"),
    ("kernels/kl.py", "if GRADIENT and n != now:", "if GRADIENT and n < now:", "test_kernels.py", "kl_kernel"),
    ("kernels/kl.py", "g_var = student - teacher - gap * gap if FORWARD", "g_var = student - teacher if FORWARD", "test_kernels.py", "kl_kernel"),
    ("kernels/kl.py", "return dh, (gweight * dsums[:, None, None])", "return dh, (gweight * 1)", "test_kernels.py", "kl_kernel"),
    ("kernels/project.py", "k = tl.where((gu < 0) & (uu > 0), gu / tl.where(uu > 0, uu, 1.0), 0.0)", "k = tl.where(uu > 0, gu / tl.where(uu > 0, uu, 1.0), 0.0)", "test_kernels.py", "projection_kernels"),
    ("kernels/project.py", "a += one_b1 * (x - a)", "a += one_b1 * x", "test_kernels.py", "update_kernels"),
    ("kernels/project.py", "end = tl.where(fine, P, 0)", "end = P", "test_kernels.py", "not_finite"),
    ("kernels/project.py", "    if alive:\n", "    if True:\n", "test_kernels.py", "not_finite"),
    ("surgery.py", '"average": lambda changed: {"beta": BETA}', '"average": lambda changed: {}', "test_surgery.py", "fused"),
    ("model.py", "self.training else 0.0, slice(1, None, 3)", "self.training else 0.0, slice(2, None, 3)", "test_model.py", "future"),
    ("model.py", "self.embed_place((mask.cumsum(1) - 1).clamp_min(0))", "self.embed_place.weight[-K:]", "test_model.py", "actor"),
    ("model.py", "x = x.bfloat16() if self.bfloat16 and self.training else x", "x = x.bfloat16() if self.bfloat16 else x", "test_model.py", "in_bfloat16"),
    ("policy.py", "        seen[1:, 0] = False", "        pass", "test_policy.py", "actor"),
    ("policy.py", "2 + 3 * (p[1] > p[0])", "2 + 3 * (p[1] < p[0])", "test_policy.py", "actor"),
    ("policy.py", "bias + norm.bias @ weight", "bias", "test_policy.py", "actor"),
    ("policy.py", "self.caches = [c[:, rows] for c in self.caches]", "self.caches = [c[:, : len(c[0, rows])] for c in self.caches]", "test_policy.py", "actor"),
    ("model.py", "states, actions = states.masked_fill(~m, 0.0), actions.masked_fill(~m, 0.0)", "pass", "test_model.py", "masked_content"),
    ("model.py", "rtg, timesteps = rtg.masked_fill(~mask, 0.0), timesteps.masked_fill(~mask, 0)", "pass", "test_model.py", "masked_content"),
    ("model.py", "nll.where(mask, 0.0).sum() / mask.sum()", "nll.mean()", "test_model.py", "nll_is"),
    ("model.py", "if hashlib.blake2b(weights).hexdigest() != meta[\"blake2b\"]:", "if False:", "test_model.py", "damaged_model_file"),
    ("data.py", "return total[ends] - total[:-1]", "return total[ends] - total[1:]", "test_data.py", "rtg_is"),
    ("data.py", "t, self.back <= t[:, -1:], rows, targets)", "t, self.back <= t[:, -1:] + 1, rows, targets)", "test_data.py", "stretch_of_one_episode"),
    ("data.py", "return task, self.end(task, u[mine])", "return task, self.end(task, u[mine] ** 2)", "test_data.py", "as_likely"),
    ("data.py", "x = torch.minimum(2 * u,", "x = torch.maximum(2 * u,", "test_data.py", "returned_more"),
    ("data.py", "torch.minimum((x", "torch.maximum((x", "test_data.py", "row_of_its_own"),
    ("data.py", "for i in np.argsort(returns, kind=\"stable\") if", "for i in range(n) if", "test_data.py", "returned_more"),
    ("data.py", "(mine + u[n]) / n", "torch.rand(B, generator=generator, device=dev, dtype=torch.float64)", "test_data.py", "follows_the_shares"),
    ("data.py", "mean = arrays[\"obs_sum\"][~held].sum(0) / steps", "mean = arrays[\"obs_sum\"].sum(0) / lengths.sum()", "test_data.py", "tenth"),
    ("data.py", "        h.update(f\"{f.relative_to(path)} {st.st_size} {st.st_mtime_ns}\\n\".encode())", "        h.update(b\"\")", "test_data.py", "follows_the_content"),
    ("data.py", "    if not np.isfinite(table).all():", "    if False:", "test_data.py", "nan_or_infinite"),
    ("data.py", "if not (discrete or isinstance(act_space, gym.spaces.Box)):", "if False:", "test_data.py", "can_not_be_learnt"),
    ("data.py", ".astype(np.int64) - space.start", ".astype(np.int64)", "test_data.py", "one_hot"),
    ("data.py", "if not ((i >= 0) & (i < space.n)).all():", "if False:", "test_data.py", "outside_its_space"),
    ("data.py", "    if about[\"first_action\"] is None:\n        actions -= low", "    if True:\n        actions -= low", "test_data.py", "one_hot"),
    ("model.py", "nll = -(x * mean).sum(-1) if discrete", "nll = -(x * mean).mean(-1) if discrete", "test_model.py", "nll"),
    ("model.py", "(mean.log_softmax(-1), torch.zeros_like(mean))", "(mean, torch.zeros_like(mean))", "test_policy.py", "most_likely"),
    ("policy.py", "F.one_hot(x.argmax(1)", "F.one_hot(x.argmin(1)", "test_policy.py", "most_likely"),
    ("policy.py", ".cpu().numpy() + self.task.first_action", ".cpu().numpy()", "test_policy.py", "most_likely"),
    ("export.py", "(last_action - t.first_action).clamp(0, t.act_dim - 1)", "(0 * last_action)", "test_export.py", "thousand_windows"),
    ("kernels/kl.py", "mean.masked_fill(~real(mean.shape[-1], task, act_dims), NEVER)", "mean", "test_kernels.py", "categorical"),
    ("kernels/kl.py", "t_mean.masked_fill(other, NEVER)", "t_mean", "test_kernels.py", "categorical"),
    ("kernels/kl.py", "A.masked_fill(discrete[task], 1)", "A", "test_kernels.py", "categorical"),
    ("kernels/kl.py", "(t_logp / temperature).log_softmax(-1)", "t_logp", "test_kernels.py", "flattens"),
    ("kernels/kl.py", "t_logp.exp() * (t_logp - logp) if", "logp.exp() * (t_logp - logp) if", "test_kernels.py", "categorical"),
    ("distill.py", "x = torch.where(discrete[batch.task][:, None, None], of_categorical, x)", "pass", "test_scripts.py", "discrete_actions"),
    ("data.py", "if env_id not in gym.registry:", "if False:", "test_data.py", "code_of_its_own"),
    ("behaviour.py", "x = np.tanh(x @ w[\"w1\"] + w[\"b1\"])", "x = np.tanh(x @ w[\"w1\"].T + w[\"b1\"])", "test_data.py", "do_what_their_file_says"),
    ("behaviour.py", "if std[i] <= STEADY * max(mean)", "", "test_data.py", "steady_snapshot"),
    ("distill.py", "        new = windows.back <= (t[ends[part]] % H)[:, None]", "        new = windows.back < windows.K", "test_distill.py", "half_a_context"),
    ("distill.py", "w = (batch.task == i).nonzero().flatten()", "w = (batch.task == 0).nonzero().flatten()", "test_distill.py", "live_targets"),
    ("distill.py", "forward_ad.make_dual(theta.detach(), u)", "forward_ad.make_dual(theta.detach(), u * 1.001)", "test_distill.py", "forward_mode"),
    ("distill.py", "(after - before) / du, 0.0) * (u @ u)", "(before - after) / du, 0.0) * (u @ u)", "test_distill.py", "estimated"),
    ("distill.py", "project_adamw(theta, g, None, m, v, **options)", "pass", "test_distill.py", "five_times_nearer"),
    ("distill.py", "        L = sums / counts.clamp_min(1)\n        loss = part @ L", "        L = sums / counts.clamp_min(1)\n        loss = L.sum()", "test_distill.py", "plain_adamw"),
    ("distill.py", "generator = torch.Generator(device).manual_seed(cfg.seed)", "generator = torch.Generator(device).manual_seed(time.time_ns() % 2**31)", "test_distill.py", "same_log_to_the_bit"),
    ("distill.py", "if not math.isfinite(loss + norm):", "if False:", "test_distill.py", "student_becomes_nan or last_good_student"),
    ("teacher.py", "if not math.isfinite(loss + norm):", "if False:", "test_distill.py", "teachers_loss_that_becomes"),
    ("distill.py", "if json.dumps(dataclasses.asdict(t)) != json.dumps(dataclasses.asdict(s.task)):", "if False:", "test_distill.py", "dataset_has_changed"),
    ("policy.py", "        self.left -= reward", "        pass", "test_evaluate.py", "sees_in_training"),
    ("policy.py", "self.actor.act(states, rtg, self.action)", "self.actor.act(states, rtg, 0 * self.action)", "test_evaluate.py", "sees_in_training"),
    ("policy.py", "        self.actor.keep(torch.from_numpy(rows))", "        self.actor.keep(slice(int(rows.sum())))", "test_evaluate.py", "alone_and_in_a_batch"),
    ("policy.py", "        self.t[rows] = 0", "        pass", "test_policy.py", "one_by_one"),
    ("policy.py", "self.left, self.age = np.where(began, self.target, self.left), np", "self.left, self.age = self.left, np", "test_policy.py", "vector_of"),
    ("policy.py", "self.caches[i] * (1 - put.sum(-1, keepdim=True)) + put @ qkv[1:]", "self.caches[i] + put @ qkv[1:]", "test_policy.py", "one_by_one"),
    ("evaluate.py", "reset(seed=seed + i)", "reset(seed=seed)", "test_evaluate.py", "alone_and_in_a_batch"),
    ("run.py", "x.copy_(tensors[name].view(x.shape))", "x.copy_(x)", "test_resume.py", "to_the_bit"),
    ("run.py", "g.set_state(tensors[f\"generator {name}\"])", "pass", "test_resume.py", "to_the_bit"),
    ("run.py", "torch.set_rng_state(tensors[\"generator torch\"][rank()].clone())", "pass", "test_resume.py", "to_the_bit"),
    ("run.py", "os.truncate(path, at)", "pass", "test_resume.py", "any_moment"),
    ("run.py", "with open(tmp, \"xb\") as f:", "with open(path, \"wb\") as f, open(tmp, \"xb\"):", "test_resume.py", "stage_of_writing"),
    ("run.py", "fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", "test_resume.py", "second_run"),
    ("run.py", "self.at, text = 0, f", "text = f", "test_resume.py", "lost"),
    ("run.py", "if self.path.is_symlink() or not at:", "if False:", "test_hostile.py", "through_a_link"),
    ("model.py", "if any(weights[k].shape != size for k, size in large.items()):", "if False:", "test_hostile.py", "hostile_model"),
    ("data.py", "return (arrays, about) if fine else None", "return (arrays, about)", "test_hostile.py", "hostile_cache"),
    ("data.py", "        isolated(build, name, path, cached)", "        build(name, path, cached)", "test_hostile.py", "minari_dataset"),
    ("data.py", "        os.replace(tmp / name, final)", "        shutil.copytree(tmp / name, final)", "test_resume.py", "collector"),
    ("run.py", "            dist.all_reduce(x)", "            pass", "test_distributed.py", "teacher_of_two"),
    ("run.py", "return x if world() == 1 else summed(x)[0] / world()", "return x * (1 + 1e-4 * rank())", "test_distributed.py", "agree and 2-exact"),
    ("run.py", "of_all = {\"generator torch\": gathered(torch.get_rng_state())}", "of_all = {\"generator torch\": torch.get_rng_state().expand(2, -1)}", "test_distributed.py", "sigterm"),
    ("run.py", "return (_asked or signal.SIGTERM) if _others_asked.item() else None", "return _asked", "test_distributed.py", "sigterm"),
    ("run.py", "store = dist.PrefixStore(os.environ.get(\"TORCHELASTIC_RESTART_COUNT\", \"0\"), store)", "pass", "test_distributed.py", "killed_process"),
    ("run.py", "    if int(os.environ.get(\"TORCHELASTIC_RESTART_COUNT\", 0)):", "    if False:", "test_distributed.py", "killed_process"),
    ("run.py", "    signal.set_wakeup_fd(write)", "    pass", "test_distributed.py", "waits_for_one"),
    ("data.py", "torch.arange(B, device=dev) + B * run.rank()", "torch.arange(B, device=dev)", "test_distributed.py", "agree and 2-default"),
    ("distill.py", "along / counts.clamp_min(1)", "along", "test_distill.py", "projected_by_itself"),
    ("distill.py", "            run.add_up(g)\n            total = g.sum(0)", "            total = g.sum(0)", "test_distributed.py", "agree and pcgrad"),
    ("distill.py", "part = drawn / (cfg.batch_size * run.world())", "part = drawn / cfg.batch_size", "test_distributed.py", "agree and 2-default"),
    ("distill.py", "                    if (i + 1) % thin and i not in (0, step):", "                    if False:", "test_distill.py", "no_more_than"),
    ("teacher.py", "torch.manual_seed(cfg.seed + 2**32 * run.rank())", "pass", "test_distributed.py", "teacher_of_two"),
    ("data.py", "            x[wrong] = self.table[rows[wrong]]", "            pass", "test_data.py", "read_ahead"),
    ("data.py", "            generator.set_state(now)", "            pass", "test_data.py", "read_ahead"),
    ("data.py", "        rows, ahead, self.ahead = rows.cpu(), self.ahead, None", "        rows, ahead, self.ahead = rows.cpu(), None, None", "test_data.py", "read_ahead_is_used"),
    ("run.py", "        if not value >= least:", "        if value < least:", "test_distill.py", "sizes_that_can_not"),
    ("run.py", "        if changed:\n            raise UserError(", "        if changed:\n            print(", "test_distill.py", "not_overwritten_unasked"),
    ("run.py", "{k: v for k, v in values.items() if k != \"step\" and v is not None}", "{}", "test_report.py", "wandb"),
    ("run.py", "id=known and known[\"id\"]", "id=None", "test_report.py", "wandb"),
    ("run.py", "        for t in self.log.trackers:\n            t.close()", "        pass", "test_report.py", "wandb"),
    ("run.py", "if getattr(cfg, package, False) and importlib.util.find_spec(package) is None:", "if False:", "test_report.py", "missing"),
    ("run.py", "and \"can't allocate memory\" not in str(e)", "and True", "test_distill.py", "out_of_memory"),
    ("run.py", "            groups.append((m[1], []))", "            groups = groups or [(m[1], [])]", "test_scripts.py", "help and distill"),
    ("run.py", "columns = list(dict.fromkeys(k for r in rows for k in r))", "columns = list(rows[0])", "test_export.py", "are_evaluated"),
    ("report.py", "    return html.escape(run.cell(x))", "    return run.cell(x)", "test_report.py", "names_are_text"),
    ("report.py", "    return name.replace(\"$\", r\"\\$\")", "    return name", "test_report.py", "names_are_text"),
    ("report.py", ".figures { display: grid;", "body { min-width: 1200px; } .figures { display: grid;", "test_report.py", "browser"),
    ("report.py", "    fig.savefig(file, **options)", "    [ax.clear() for ax in axes]; fig.clear(); fig.savefig(file, **options)", "test_report.py", "browser"),
    ("report.py", "    if None in files:", "    if False:", "test_report.py", "not_finished"),
    ("report.py", "min(r.retention.values()):.1f} % of the worst", "max(r.retention.values()):.1f} % of the worst", "test_report.py", "own_numbers"),
    ("evaluate.py", "        if there != [t.obs_dim, t.act_dim]:", "        if False:", "test_evaluate.py", "played or checked"),
    ("teacher.py", "            evaluate.check([task])", "            pass", "test_evaluate.py", "checked"),
    ("distill.py", "            evaluate.check(tasks)", "            pass", "test_evaluate.py", "checked"),
    ("kernels/__init__.py", "or shutil.which(\"gcc\") or shutil.which(\"clang\") else \"C compiler\"", "or True else \"C compiler\"", "test_kernels.py", "compiler"),
    ("export.py", "        self.given = {k: x[rows] for k, x in self.given.items()}", "        self.given = {k: x[: rows.sum()] for k, x in self.given.items()}", "test_export.py", "keeps_context"),
    ("export.py", "self.given[\"return_to_go\"] - reward", "self.given[\"return_to_go\"]", "test_export.py", "keeps_context"),
]  # fmt: skip


def main(word=""):
    survived = []
    with tempfile.TemporaryDirectory() as tmp:
        tree = Path(tmp) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "out", "__pycache__", "results"))
        for bug in (b for b in BUGS if word in " ".join(b)):
            file, there, planted, tests, names = bug
            text = (tree / file).read_text()
            assert text.count(there) == 1, f"{file} holds this {text.count(there)} times, not once: {there}"
            (tree / file).write_text(text.replace(there, planted))
            p = subprocess.run([sys.executable, "-m", "pytest", "-qx", "-n0", "-p", "no:cacheprovider", f"tests/{tests}", "-k", names], cwd=tree, capture_output=True, text=True)
            (tree / file).write_text(text)
            found = p.returncode == 1
            print(f"{'found   ' if found else 'SURVIVED'} {file}: {planted.strip()[:90]}", flush=True)
            if not found:
                survived.append(bug)
                print(p.stdout[-1500:])
    print(f"{len(survived)} survived")
    return bool(survived)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
