// The report's sections. `data` is what report_data.py made of the run folders.

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const single = runs.length === 1;
const state = { memory: 0, hidden: new Set(), metric: "score" };
const charts = [];
const redrawAll = () => charts.forEach((one) => one.redraw());

const dot = (run) => make("span", { class: "dot", style: { background: colorOf(run) } });
const named = (run) => (single ? null : make("h3", {}, dot(run), " ", runs[run].name));
const unique = (items) => [...new Set(items)];
const heading = (title, id) => make("h2", { id }, title);
const quiet = (...words) => make("p", { class: "quiet small" }, ...words);

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "\u2013";
  const whole = Math.round(seconds);
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60)];
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
}

function picture(source, description, open) {
  const small = source.startsWith("data:image/png");
  const image = make("img", { src: source, alt: description, class: small ? "small-picture" : "", decoding: "sync" });
  return open ? make("button", { class: "picture", type: "button", title: "enlarge", onclick: open }, image) : image;
}

/** The scores that evaluations have, the strictest first. */
function metrics() {
  const found = unique(runs.flatMap((run) => run.evaluations.flatMap((one) => Object.keys(one.values))));
  const rank = (name) => (/(^|\/)strict$/.test(name) ? 0 : name === "score" ? 1 : 2);
  return found.sort((a, b) => rank(a) - rank(b));
}

/* ---- the top ---- */

function status(run) {
  const done = `${run.done} of ${run.iterations ?? "?"} iterations`;
  if (run.finished) return [make("span", { class: "status good" }, "finished"), `${done} in ${duration(run.seconds)}`];
  return [make("span", { class: "status bad" }, "not finished"), `${done}, the last written ${run.written}`];
}

function top() {
  const links = [["results", "Results"], ["pictures", "Pictures"], ["curves", "Curves"], ["time", "Time"], ["judged", "Best and worst"], ["settings", "Settings"]];
  const head = make("header", {}, make("h1", {}, single ? runs[0].name : `${runs.length} runs compared`));
  if (single) head.append(make("div", { class: "quiet" }, status(runs[0])), tiles(runs[0]));
  else {
    head.append(make("div", { class: "runs small" }, runs.map((run, i) => make("div", {}, dot(i), " ", make("b", {}, run.name), " ", status(run)))));
  }
  const nav = make("nav", {}, links.map(([id, title]) => make("a", { href: `#${id}` }, title)));
  return [head, nav];
}

function tiles(run) {
  const name = metrics()[0];
  const known = run.evaluations.filter((one) => one.values[name] !== undefined);
  const [first, last] = [known[0], known[known.length - 1]];
  const reward = run.curves.values.reward || [];
  const device = Object.entries(run.environment).find(([key]) => key.startsWith("device "));
  const facts = [];
  if (last && last !== first) facts.push([`${format(first.values[name])} \u2192 ${format(last.values[name])}`, `held-out ${name}`]);
  else if (last) facts.push([format(last.values[name]), `held-out ${name}, iteration ${last.step}`]);
  if (reward.length) facts.push([`${format(reward[0])} \u2192 ${format(reward[reward.length - 1])}`, "training reward, first and last"]);
  const stages = medians(run);
  if (stages.length) facts.push([`${format(stages.reduce((sum, [, seconds]) => sum + seconds, 0))} s`, "an iteration, median"]);
  if (device) facts.push([device[0].replace(/^device \w+: /, ""), device[1] === "1" ? "device" : `${device[1]} devices`]);
  return make("div", { class: "tiles" }, facts.map(([value, label]) => make("div", { class: "tile" }, make("b", {}, value), make("span", {}, label))));
}

/* ---- base and final ---- */

function results() {
  const ended = runs.map((run, i) => i).filter((i) => Object.keys(runs[i].by_steps).length);
  const section = make("section", {}, heading("Held-out scores, before and after", "results"));
  if (!ended.length) return [...section.childNodes, quiet("They come with the end of a run. The curves below have what was evaluated on the way.")];
  const steps = unique(ended.flatMap((i) => Object.keys(runs[i].by_steps)));
  const names = metrics();
  const box = make("div", { class: "scroll" });
  const stepChoice = choice("Rollout steps", steps, () => fill());
  const scoreChoice = choice("Score", names, () => fill());
  function fill() {
    const [chosen, name] = [stepChoice.select.value, scoreChoice.select.value];
    box.replaceChildren(resultTable(ended, chosen, name));
  }
  fill();
  const rest = runs.filter((run, i) => !ended.includes(i)).map((run) => run.name);
  section.append(make("div", { class: "bar" }, scoreChoice, steps.length > 1 ? stepChoice : null), box);
  box.classList.add("fit");
  if (rest.length) section.append(quiet(`Not finished and so not here: ${rest.join(", ")}.`));
  return section;
}

function choice(label, values, changed) {
  const select = make("select", { onchange: changed }, values.map((value) => make("option", { value }, value)));
  const element = make("label", {}, label, select);
  element.select = select;
  return element;
}

function resultTable(ended, steps, name) {
  const pairs = ended.map((i) => runs[i].by_steps[steps]);
  const tags = unique(pairs.flatMap((pair) => (pair ? Object.keys(pair.final.tags || {}) : []))).sort();
  const rows = [["all prompts", (side) => side[name]], ...tags.map((tag) => [tag, (side) => ((side.tags || {})[tag] || {})[name]])];
  const titles = ended.map((i) => (single ? null : make("th", { colspan: 3 }, dot(i), " ", runs[i].name)));
  const columns = ended.flatMap(() => ["base", "final", "change"].map((title) => make("th", { class: "number" }, title)));
  const head = make("thead", {}, single ? null : make("tr", {}, make("th"), titles), make("tr", {}, make("th"), columns));
  const body = rows.map(([label, take]) => {
    const cells = pairs.flatMap((pair) => {
      const [base, final] = pair ? [take(pair.base), take(pair.final)] : [undefined, undefined];
      const change = base === undefined || final === undefined || base === null || final === null ? null : final - base;
      const sign = change === null || Math.abs(change) < 5e-5 ? "" : change > 0 ? "good" : "bad";
      const text = change === null ? "\u2013" : `${change > 0 ? "+" : change < 0 ? "\u2212" : ""}${Math.abs(change).toFixed(3)}`;
      return [fixed(base), fixed(final), text].map((word, i) => make("td", { class: `number ${i === 2 ? sign : ""}` }, word));
    });
    return make("tr", { class: label === "all prompts" ? "total" : "" }, make("th", { scope: "row" }, label), cells);
  });
  return make("table", { "data-results": name }, head, make("tbody", {}, body));
}

const fixed = (value) => (value === undefined || value === null ? "\u2013" : Math.abs(value) < 100 ? value.toFixed(3) : format(value));

/* ---- curves ---- */

function curve(title, name, options = {}) {
  const series = runs.map((run, i) => ({ run: i, label: run.name, x: run.curves.steps, y: run.curves.values[name] || [] })).filter((one) => one.y.length);
  return addChart(title, series, { smooth: true, ...options });
}

function addChart(title, series, options) {
  if (!series.length) return null;
  const made = chart(title, series, options, state);
  charts.push(made);
  return made;
}

function evaluationCurve(title, take, options = {}) {
  const series = runs.map((run, i) => {
    const known = run.evaluations.filter((one) => take(one) !== undefined);
    const tell = (at) => `${known[at].label ? `${known[at].label}, ` : ""}${known[at].prompts ?? "?"} prompts`;
    return { run: i, label: run.name, x: known.map((one) => one.step), y: known.map(take), tell };
  });
  return addChart(title, series.filter((one) => one.x.length), options);
}

const MAIN = [
  ["Reward", "reward", "mean over an iteration's images"],
  ["KL", "kl", "to the start model, mean over tokens, nats"],
  ["Entropy", "entropy", "of the policy, mean over tokens, nats"],
  ["Gradient norm", "grad_norm", "before clipping"],
  ["Dead groups", "dead_groups", "share of groups whose images all got the same score"],
];

function curves() {
  const main = make("div", { class: "charts" }, MAIN.map(([title, name, note]) => curve(title, name, { note })));
  const known = new Set(MAIN.map(([, name]) => name));
  const rest = unique(runs.flatMap((run) => Object.keys(run.curves.values))).filter((name) => !known.has(name) && !name.startsWith("seconds/"));
  const more = make("details", {}, make("summary", {}, `${rest.length} more curves`), make("div", { class: "charts many" }, rest.map((name) => curve(name, name, { height: 150 }))));
  return [heading("Curves", "curves"), curveBar(), main, accuracy(), rest.length ? more : null];
}

function curveBar() {
  const longest = Math.max(...runs.map((run) => run.curves.steps.length));
  state.memory = longest > 100 ? 0.8 : 0;
  const shown = make("output", {}, String(state.memory));
  const slider = make("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: state.memory, id: "smoothing", oninput: () => {
    state.memory = Number(slider.value);
    shown.textContent = slider.value;
    redrawAll();
  } });
  const chips = single ? [] : runs.map((run, i) => {
    const chip = make("button", { class: "chip", type: "button", "aria-pressed": "true", onclick: () => {
      const hide = !state.hidden.has(i);
      if (hide) state.hidden.add(i);
      else state.hidden.delete(i);
      chip.setAttribute("aria-pressed", String(!hide));
      redrawAll();
    } }, dot(i), run.name);
    return chip;
  });
  return make("div", { class: "bar" }, chips, make("label", { class: "wide some" }, "Smoothing", slider, shown));
}

function accuracy() {
  const tags = unique(runs.flatMap((run) => run.evaluations.flatMap((one) => Object.keys(one.tags)))).sort();
  const names = metrics();
  if (!names.length) return null;
  const grid = make("div", { class: "charts many", id: "tags" });
  const select = choice("Score", names, fill);
  function fill() {
    for (const old of grid.childNodes) charts.splice(charts.indexOf(old), 1);
    const name = select.select.value;
    const every = runs.flatMap((run) => run.evaluations.flatMap((one) => [one.values[name], ...Object.values(one.tags).map((tag) => tag[name])]));
    const known = every.filter((value) => value !== null && value !== undefined);
    const range = known.every((value) => value >= 0 && value <= 1) ? [0, 1.04] : undefined;
    grid.replaceChildren(...[
      evaluationCurve("all prompts", (one) => one.values[name], { range, height: 150 }),
      ...tags.map((tag) => evaluationCurve(tag, (one) => (one.tags[tag] || {})[name], { range, height: 150 })),
    ].filter(Boolean));
  }
  fill();
  return make("div", {}, make("h3", {}, "Held-out accuracy, all and per tag"), make("div", { class: "bar" }, select), grid);
}

/* ---- time ---- */

/** [stage, median seconds an iteration]; the first iteration, which compiles, does not sway a median. */
function medians(run) {
  return Object.entries(run.curves.values).filter(([name]) => name.startsWith("seconds/")).map(([name, values]) => {
    const known = values.filter((value) => value !== null).sort((a, b) => a - b);
    return [name.slice("seconds/".length), known[(known.length - 1) >> 1]];
  });
}

function time() {
  const stages = unique(runs.flatMap((run) => medians(run).map(([stage]) => stage)));
  if (!stages.length) return null;
  const shade = (stage) => `var(--run${stages.indexOf(stage) % 8})`;
  const legend = make("div", { class: "legend" }, stages.map((stage) => make("span", {}, make("span", { class: "dot", style: { background: shade(stage) } }), stage)));
  const bars = runs.map((run, i) => {
    const parts = medians(run);
    const sum = parts.reduce((total, [, seconds]) => total + seconds, 0);
    const stack = make("div", { class: "stack", role: "img", "aria-label": parts.map(([stage, seconds]) => `${stage} ${format(seconds)} s`).join(", ") },
      parts.map(([stage, seconds]) => make("span", { title: `${stage} ${format(seconds)} s`, style: { background: shade(stage), flex: `${seconds / (sum || 1)} 0 0` } })));
    const words = parts.map(([stage, seconds]) => `${stage} ${format(seconds)} s`).join(" \u00b7 ");
    return [named(i), make("div", { class: "card" }, stack, make("div", { class: "small quiet number", style: { whiteSpace: "normal" } }, words))];
  });
  const panels = make("div", { class: "charts many", style: { marginTop: ".75rem" } }, stages.map((stage) => curve(`${stage}, seconds`, `seconds/${stage}`, { robust: true, height: 140 })));
  return [heading("Time per stage", "time"), quiet("Median seconds an iteration. Evaluations, pictures and checkpoints are not in it. A time far above the rest, as of an iteration that compiles, touches the upper edge of its chart."), legend, ...bars, panels];
}

/* ---- pictures ---- */

const momentWords = (step, label) => (label ? `iteration ${step} (${label})` : `iteration ${step}`);

/** A slider over iterations that calls show(step). */
function stepSlider(title, steps, labels, show, playable) {
  const shown = make("output");
  const slider = make("input", { type: "range", min: 0, max: Math.max(0, steps.length - 1), step: 1, value: steps.length - 1, disabled: steps.length < 2, "aria-label": title });
  const set = () => {
    const step = steps[Number(slider.value)];
    shown.textContent = momentWords(step, labels.get(step));
    slider.setAttribute("aria-valuetext", shown.textContent);
    show(step);
  };
  slider.addEventListener("input", set);
  let timer = null;
  const play = make("button", { type: "button", onclick: () => {
    if (timer) {
      clearInterval(timer);
      timer = null;
    } else {
      slider.value = 0;
      set();
      timer = setInterval(() => {
        if (Number(slider.value) === steps.length - 1) play.click();
        else { slider.value = Number(slider.value) + 1; set(); }
      }, 700);
    }
    play.textContent = timer ? "Stop" : "Play";
  } }, "Play");
  set();
  return make("div", { class: "bar" }, make("label", { class: "wide" }, slider, shown), playable && steps.length > 1 ? play : null);
}

/** The run's moment at this iteration, or its last one before. */
function momentAt(list, step) {
  return list.filter((one) => one.step <= step).pop() || list[0];
}

function pictures() {
  const withPictures = runs.map((run, i) => i).filter((i) => runs[i].moments.length);
  if (!withPictures.length) return [heading("The same prompts through training", "pictures"), quiet("No pictures were drawn yet.")];
  const moments = withPictures.flatMap((i) => runs[i].moments);
  const steps = unique(moments.map((one) => one.step)).sort((a, b) => a - b);
  const labels = new Map(moments.filter((one) => one.label).map((one) => [one.step, single ? one.label : one.step === 0 ? one.label : ""]));
  const blocks = withPictures.map((i) => ({ i, grid: make("div", { class: "pictures", "data-run": i }), caption: named(i) }));
  const slider = stepSlider("iteration of the pictures", steps, labels, (step) => blocks.forEach(({ i, grid }) => showMoment(grid, i, momentAt(runs[i].moments, step))), true);
  slider.id = "moments";
  return [heading("The same prompts through training", "pictures"), quiet("Held-out prompts, each from the same noise every time. Tap a picture for all of its moments."), slider, ...blocks.flatMap(({ caption, grid }) => [caption, grid])];
}

function showMoment(grid, run, moment) {
  const images = grid.querySelectorAll("img");
  if (moment.sheet) {
    grid.style.display = "block";
    grid.replaceChildren(picture(moment.sheet, "sample pictures with captions"));
    return;
  }
  grid.style.display = "";
  if (grid.dataset.captions === JSON.stringify(moment.cells.map((cell) => cell.caption)) && images.length === moment.cells.length) {
    images.forEach((image, i) => { image.src = moment.cells[i].src; });
    return;
  }
  grid.dataset.captions = JSON.stringify(moment.cells.map((cell) => cell.caption));
  grid.replaceChildren(...moment.cells.map((cell, i) => {
    const open = () => enlarge(run, cell.caption, grid.querySelectorAll("img")[i].src);
    return make("figure", {}, picture(cell.src, cell.caption, open), make("figcaption", {}, cell.caption));
  }));
}

/** One prompt, large, with all of its moments below. */
function enlarge(run, caption, source) {
  const moments = runs[run].moments.flatMap((one) => one.cells.filter((cell) => cell.caption === caption).map((cell) => ({ ...one, src: cell.src })));
  const large = picture(source, caption);
  large.classList.add("large");
  const words = make("span", { class: "quiet small" });
  const buttons = moments.map((one) => make("button", { type: "button", onclick: () => choose(one) }, picture(one.src, momentWords(one.step, one.label)), one.label || String(one.step)));
  function choose(one) {
    large.src = one.src;
    words.textContent = momentWords(one.step, one.label);
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(moments[i] === one)));
  }
  const close = make("button", { type: "button", onclick: () => dialog.close() }, "Close");
  const dialog = make("dialog", { onclose: () => dialog.remove(), onclick: (event) => { if (event.target === dialog) dialog.close(); } },
    large, make("div", { class: "strip" }, buttons), make("p", {}, caption), make("div", { class: "bar" }, words, close));
  document.body.append(dialog);
  choose(moments.find((one) => one.src === source) || moments[0]);
  dialog.showModal();
}

/* ---- best and worst ---- */

function judged() {
  const withImages = runs.map((run, i) => i).filter((i) => runs[i].extremes.length);
  const title = heading("Best and worst held-out images", "judged");
  if (!withImages.length) return [title, quiet("No evaluation has kept images.")];
  const steps = unique(withImages.flatMap((i) => runs[i].extremes.map((one) => one.step))).sort((a, b) => a - b);
  const blocks = make("div", { id: "extremes" });
  const labels = new Map(steps.includes(0) ? [[0, "base"]] : []);
  const slider = stepSlider("iteration of the evaluation", steps, labels, (step) => blocks.replaceChildren(...withImages.flatMap((i) => judgedOf(i, momentAt(runs[i].extremes, step))).filter(Boolean)), false);
  return [title, quiet("Of each prompt at most its best and its worst image. Of equal scores the first counts."), slider, blocks];
}

function judgedOf(run, moment) {
  return [named(run), ...["worst", "best"].flatMap((kind) => {
    const cells = moment.cells.filter((cell) => cell.kind === kind);
    const late = single ? "" : `, iteration ${moment.step}`;
    return [make("h3", { class: kind === "best" ? "good" : "bad" }, (kind === "best" ? "Best" : "Worst") + late), make("div", { class: "judged" }, cells.map(judgedCard))];
  })];
}

function judgedCard(cell) {
  const raw = Object.entries(cell.raw).map(([name, value]) => `${name} ${format(value)}`).join(" \u00b7 ");
  const words = make("div", { class: "words" }, make("b", {}, format(cell.score)), make("p", {}, cell.prompt), cell.reason ? make("p", { class: "quiet" }, cell.reason) : null, raw ? make("p", { class: "quiet small" }, raw) : null);
  return make("div", { class: "card" }, picture(cell.src, cell.prompt), words);
}

/* ---- settings ---- */

function facts(title, part, open) {
  const names = unique(runs.flatMap((run) => Object.keys(run[part])));
  if (!names.length) return null;
  const differs = (name) => unique(runs.map((run) => run[part][name])).length > 1;
  const rows = names.map((name) => {
    const row = make("tr", {}, make("th", { scope: "row" }, name), runs.map((run) => make("td", {}, run[part][name] ?? "\u2013")));
    row.different = differs(name);
    return row;
  });
  const head = single ? null : make("thead", {}, make("tr", {}, make("th"), runs.map((run, i) => make("th", {}, dot(i), " ", run.name))));
  const only = make("input", { type: "checkbox", checked: true, onchange: () => rows.forEach((row) => { row.hidden = only.checked && !row.different; }) });
  const bar = single ? null : make("div", { class: "bar" }, make("label", {}, only, "only what differs"));
  if (!single) rows.forEach((row) => { row.hidden = !row.different; });
  return make("details", { open }, make("summary", {}, title), bar, make("div", { class: "scroll facts" }, make("table", {}, head, make("tbody", {}, rows))));
}

function notes() {
  const lines = runs.flatMap((run) => run.notes.map((note) => make("li", {}, single ? "" : `${run.name}: `, note)));
  return lines.length ? [heading("Notes", "notes"), make("ul", { class: "small" }, lines)] : null;
}

const sections = [top(), results(), pictures(), curves(), time(), judged(), [heading("Settings", "settings"), facts("Machine and versions", "environment", true), facts("Configuration", "config", !single)], notes()];
document.getElementById("report").append(...sections.flat(Infinity).filter(Boolean));
