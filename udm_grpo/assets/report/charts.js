"use strict";

// Small curves in SVG: several series over iterations, the nearest point told on hover, touch and arrow keys.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes and children; texts become text nodes, never markup. */
function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "style") Object.assign(element.style, value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

function draw(name, attributes, parent, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

const colorOf = (run) => `var(--run${run % 8})`;

/** A number in four digits. */
function format(value) {
  if (value === null || value === undefined) return "\u2013";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

/** Moving average with the given memory, in [0, 1), without the pull of its zero start. */
function smoothed(values, memory) {
  let sum = 0;
  let weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = sum * memory + value * (1 - memory);
    weight = weight * memory + (1 - memory);
    return sum / weight;
  });
}

/** About `count` round numbers within [low, high]. */
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough) || 10 * power;
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) found.push(at * step);
  return found;
}

function nearest(numbers, wanted) {
  let low = 0;
  let high = numbers.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (numbers[middle] < wanted) low = middle;
    else high = middle;
  }
  return Math.abs(numbers[low] - wanted) <= Math.abs(numbers[high] - wanted) ? low : high;
}

/** What the axis spans; with `robust`, a few values far above the rest stay off the scale. */
function span(values, fixed, robust) {
  if (fixed) return fixed;
  if (!values.length) return [0, 1];
  const sorted = [...values].sort((a, b) => a - b);
  let low = sorted[0];
  let high = sorted[sorted.length - 1];
  if (robust) {
    const usual = sorted[Math.floor(0.9 * (sorted.length - 1))];
    low = Math.min(0, low);
    if (high > 3 * usual && usual > 0) high = 1.5 * usual;
  }
  if (high === low) return [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  const room = (high - low) * 0.06;
  return [robust ? low : low - room, high + room];
}

/**
 * A chart of series {run, label, x, y, tell}: x are iterations, y numbers or null, tell(i) adds words about a point.
 * options: {note, range: [low, high], robust, smooth: whether the page's smoothing acts, height}
 * state: {memory, hidden: Set of runs}, shared by all charts; `redraw` follows it.
 */
function chart(title, series, options, state) {
  const svg = document.createElementNS(SVG, "svg");
  const tip = make("div", { class: "tip", role: "status", hidden: true });
  const plot = make("div", { class: "plot" }, svg, tip);
  const last = series.length === 1 ? series[0].y.findLast((value) => value !== null) : undefined;
  const latest = make("small", {}, last === undefined ? "" : `last ${format(last)}`);
  const note = options.note ? make("p", {}, options.note) : null;
  const figure = make("figure", { class: "card chart", "data-chart": title }, make("figcaption", {}, title, latest), note, plot);
  svg.setAttribute("role", "img");
  svg.setAttribute("tabindex", "0");
  svg.setAttribute("aria-label", `${title} over iterations`);
  let frame = null;
  let at = null;

  function redraw() {
    const width = plot.clientWidth;
    if (!width) return;
    const height = options.height || 176;
    const narrow = width < 220;
    const edge = { left: narrow ? 32 : 46, right: 10, top: 8, bottom: 22 };
    const shown = series.filter((one) => !state.hidden.has(one.run));
    const steps = shown.flatMap((one) => [one.x[0], one.x[one.x.length - 1]]);
    const [first, final] = steps.length ? [Math.min(...steps), Math.max(...steps)] : [0, 1];
    const [low, high] = span(shown.flatMap((one) => one.y.filter((value) => value !== null)), options.range, options.robust);
    const across = (step) => edge.left + ((step - first) / (final - first || 1)) * (width - edge.left - edge.right);
    const up = (value) => height - edge.bottom - ((Math.min(value, high) - low) / (high - low)) * (height - edge.top - edge.bottom);
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.style.height = `${height}px`;
    for (const value of ticks(low, high, narrow ? 3 : 4)) {
      draw("line", { class: "grid", x1: edge.left, x2: width - edge.right, y1: up(value), y2: up(value) }, svg);
      draw("text", { x: edge.left - 6, y: up(value) + 4, "text-anchor": "end" }, svg, format(value));
    }
    for (const step of ticks(first, final === first ? first + 1 : final, narrow ? 2 : width < 330 ? 3 : 6).filter(Number.isInteger)) {
      if (step > final) continue;
      const anchor = across(step) > width - 24 ? "end" : "middle";
      draw("text", { x: across(step) + (anchor === "end" ? 8 : 0), y: height - 6, "text-anchor": anchor }, svg, String(step));
    }
    for (const one of shown) line(one, across, up);
    frame = { across, up, shown, first, final, width, edge, height };
    if (at !== null) point(at);
  }

  function line(one, across, up) {
    const path = (values) => {
      let pen = "M";
      return one.x.map((step, i) => {
        if (values[i] === null) { pen = "M"; return ""; }
        const piece = `${pen}${across(step).toFixed(1)} ${up(values[i]).toFixed(1)}`;
        pen = "L";
        return piece;
      }).join("");
    };
    const memory = options.smooth ? state.memory : 0;
    const dash = one.run >= 8 ? "6 3" : "none";
    if (memory > 0) draw("path", { class: "raw", d: path(one.y) }, svg).style.stroke = colorOf(one.run);
    const main = draw("path", { class: "line", d: path(memory > 0 ? smoothed(one.y, memory) : one.y), "data-run": one.run, "stroke-dasharray": dash }, svg);
    main.style.stroke = colorOf(one.run);
    if (one.x.length <= 30 && memory === 0) {
      one.x.forEach((step, i) => {
        if (one.y[i] === null) return;
        draw("circle", { class: "mark", cx: across(step), cy: up(one.y[i]), r: 2.6 }, svg).style.fill = colorOf(one.run);
      });
    }
  }

  /** Tell what lies at this iteration. */
  function point(step) {
    svg.querySelectorAll(".cross, .here").forEach((element) => element.remove());
    const found = frame.shown.filter((one) => one.x.length).map((one) => ({ one, i: nearest(one.x, step) }));
    if (!found.length) return;
    at = found.map(({ one, i }) => one.x[i]).reduce((a, b) => (Math.abs(a - step) <= Math.abs(b - step) ? a : b));
    const x = frame.across(at);
    draw("line", { class: "cross", x1: x, x2: x, y1: frame.edge.top, y2: frame.height - frame.edge.bottom }, svg);
    const near = found.filter(({ one, i }) => Math.abs(one.x[i] - at) <= (frame.final - frame.first) * 0.01);
    const rows = near.map(({ one, i }) => {
      const value = one.y[i];
      if (value !== null) draw("circle", { class: "here", cx: frame.across(one.x[i]), cy: frame.up(value), r: 4 }, svg).style.fill = colorOf(one.run);
      const words = one.tell ? one.tell(i) : "";
      const name = series.length > 1 ? `${one.label} ` : "";
      return make("div", {}, make("span", { class: "dot", style: { background: colorOf(one.run) } }), make("span", {}, name, make("b", { class: "number" }, format(value)), words ? make("span", { class: "quiet" }, ` \u00b7 ${words}`) : null));
    });
    tip.replaceChildren(make("span", { class: "quiet" }, `iteration ${at}`), ...rows);
    tip.hidden = false;
    const right = x > frame.width / 2;
    tip.style.left = right ? "auto" : `${x + 10}px`;
    tip.style.right = right ? `${frame.width - x + 10}px` : "auto";
  }

  function leave() {
    at = null;
    tip.hidden = true;
    svg.querySelectorAll(".cross, .here").forEach((element) => element.remove());
  }

  function follow(event) {
    if (!frame) return;
    const inside = (event.clientX - svg.getBoundingClientRect().left - frame.edge.left) / (frame.width - frame.edge.left - frame.edge.right);
    point(frame.first + inside * (frame.final - frame.first));
  }

  svg.addEventListener("pointermove", follow);
  svg.addEventListener("pointerdown", follow);
  svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") leave(); });
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const turn = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!turn || !frame) return;
    event.preventDefault();
    const all = [...new Set(frame.shown.flatMap((one) => one.x))].sort((a, b) => a - b);
    const now = at === null ? (turn > 0 ? -1 : all.length) : nearest(all, at);
    point(all[Math.min(all.length - 1, Math.max(0, now + turn))]);
  });
  new ResizeObserver(redraw).observe(plot);
  figure.redraw = redraw;
  return figure;
}
