// Brings the explorers of a page to life: plain DOM, no library, no network. Text goes in as text, never as
// HTML, so that a segment may have any name. `awaken` is called by the fragment with the key of its container.

// -- small tools ------------------------------------------------------------------------------------------

function el(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "rect", "circle", "line", "text", "image"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const unroll = (runs) => runs.flatMap(([start, length]) => Array.from({ length }, (_, i) => start + i));
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const sum = (values) => values.reduce((total, value) => total + value, 0);

function percent(share) {
  if (share > 0 && share < 0.001) return "<\u00a00.1\u00a0%";
  const digits = share > 0 && share < 0.0995 ? 1 : 0;
  return `${(100 * share).toFixed(digits)}\u00a0%`;
}

function short(value) {
  if (value === null) return "–";
  const text = Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(2);
  return String(Number(text)).replace("-", "−");
}

// -- the data ---------------------------------------------------------------------------------------------

// One attention site. A weight is one byte b: b² over the sum of b² in its row (see explorer_data.py).
class Site {
  constructor(data, length) {
    Object.assign(this, { name: data.name, heads: data.heads, kept: data.kept });
    this.queries = unroll(data.queries);
    this.keys = unroll(data.keys);
    this.bytes = bytes(data.weights);
    this.rowOf = new Int32Array(length).fill(-1);
    this.columnOf = new Int32Array(length).fill(-1);
    this.queries.forEach((token, row) => (this.rowOf[token] = row));
    this.keys.forEach((token, column) => (this.columnOf[token] = column));
  }

  get totals() {
    if (!this.found) {
      this.found = new Float64Array(this.kept * this.queries.length);
      this.bytes.forEach((b, i) => (this.found[Math.floor(i / this.keys.length)] += b * b));
    }
    return this.found;
  }

  has(token, reverse) {
    return (reverse ? this.columnOf : this.rowOf)[token] >= 0;
  }

  // Weights over the whole sequence: what `token` looks at, or who looks at it. head 0 is the mean of all.
  weights(token, head, reverse, length) {
    const out = new Float64Array(length);
    const heads = head ? [head - 1] : Array.from({ length: this.kept }, (_, i) => i);
    const [rows, columns] = [this.queries.length, this.keys.length];
    const weight = (h, row, column) => {
      const total = this.totals[h * rows + row];
      return total ? this.bytes[(h * rows + row) * columns + column] ** 2 / total / heads.length : 0;
    };
    for (const h of heads) {
      if (reverse) this.queries.forEach((q, row) => (out[q] += weight(h, row, this.columnOf[token])));
      else this.keys.forEach((k, column) => (out[k] += weight(h, this.rowOf[token], column)));
    }
    return out;
  }
}

// A sequence of tokens in segments, with the mask of who may look at whom: distinct rows, one bit a token.
class Tokens {
  constructor(data) {
    Object.assign(this, { name: data.name, segments: data.segments, rows: data.mask.rows });
    this.length = this.rows.length;
    this.bits = bytes(data.mask.bits);
    this.segmentOf = [];
    for (const s of this.segments) {
      s.start = this.segmentOf.length;
      for (let i = 0; i < s.length; i++) this.segmentOf.push(s);
    }
    this.sites = data.sites.map((site) => new Site(site, this.length));
  }

  sees(query, key) {
    return (this.bits[this.rows[query] * Math.ceil(this.length / 8) + (key >> 3)] >> (7 - (key & 7))) & 1;
  }

  may(token, reverse) {
    return Array.from({ length: this.length }, (_, i) => (reverse ? this.sees(i, token) : this.sees(token, i)));
  }

  sitesOf(token, reverse) {
    return this.sites.filter((site) => site.has(token, reverse));
  }

  title(token) {
    const s = this.segmentOf[token];
    const word = s.words?.[token - s.start];
    return s.length === 1 ? s.name : `${s.name}[${token - s.start}]${word ? ` “${word}”` : ""}`;
  }

  place(token) {
    const s = this.segmentOf[token];
    const i = token - s.start;
    if (s.grid) {
      const [rows, columns] = s.grid;
      return `row ${Math.floor(i / columns)}, column ${i % columns} of ${rows} × ${columns} patches`;
    }
    return s.length === 1 ? "the only one of its segment" : `place ${i} in a segment of ${s.length}`;
  }
}

const NOTES = {
  image: "A patch of a camera picture, made into a token.",
  picture: "A whole camera picture, made into one token.",
  language: "Words of the instruction.",
  state: "What the robot knows of its own body.",
  action: "An action as a token.",
  time: "How far the sampler has come.",
  latent: "A summary that the network carries, not a measurement.",
  query: "A learned question: what comes out at its place becomes an action.",
  padding: "Filler that makes sequences equally long.",
};

// What is shown now, worked out once for all panels.
function lookOf(state, data) {
  const { sequence, reverse } = state;
  if (!sequence) return { data, shares: [] };
  const token = state.hovered ?? state.kept;
  const may = sequence.may(token, reverse);
  const sites = sequence.sitesOf(token, reverse);
  const chosen = state.layer.get(sites.map((site) => site.name).join()) ?? sites.length - 1;
  const site = sites[chosen];
  const head = site ? Math.min(state.head, site.kept > 1 ? site.kept : 0) : 0;
  const weights = site && site.weights(token, head, reverse, sequence.length);
  const look = { data, sequence, reverse, token, may, sites, chosen, site, head, weights };
  look.count = sum(may);
  look.most = weights ? Math.max(...weights) : 0;
  look.shares = site ? sharesOf(look) : [];
  return look;
}

// How a token's attention is shared out among segments; in reverse, how much a segment's tokens give it each.
// "even" is what it would be if all open places got the same.
function sharesOf({ sequence, reverse, may, site, weights, token }) {
  const inside = (reverse ? site.queries : site.keys).filter((t) => may[t]);
  return sequence.segments.flatMap((segment, index) => {
    const all = (reverse ? site.queries : site.keys).filter((t) => sequence.segmentOf[t] === segment);
    if (!all.length) return [];
    const total = sum(all.map((t) => weights[t]));
    const open = inside.filter((t) => sequence.segmentOf[t] === segment).length;
    const keys = site.keys.filter((t) => sequence.sees(all[0], t)).length;
    const even = reverse ? (open && keys ? 1 / keys : 0) : inside.length ? open / inside.length : 0;
    return [{ segment, index, share: reverse ? total / all.length : total, even }];
  });
}

function headText({ site, head }) {
  if (site.heads === 1) return "its one head";
  return head ? `head ${head - 1}` : `mean of ${site.heads} heads`;
}

function closedText({ sequence, may }) {
  const closed = sequence.segments.flatMap((s) => {
    const shut = s.length - sum(may.slice(s.start, s.start + s.length));
    if (!shut) return [];
    return [shut === s.length ? s.name : `${shut} of ${s.length} in ${s.name}`];
  });
  const more = closed.length > 4 ? [`${closed.length - 3} more segments`] : [];
  const told = more.length ? [...closed.slice(0, 3), ...more] : closed;
  return told.length ? `, not: ${told.join(", ")}` : "";
}

const mostOf = (shares) => shares.reduce((a, b) => (b.share > a.share ? b : a));

// The tokens that a site shows to a token, or that may look at it there.
const offered = ({ site, reverse, may }) => (reverse ? site.queries : site.keys).filter((t) => may[t]);

// The one patch that should be named, as in viz.attention: eight times the even share, and no segment without
// patches gets more than twice as much.
function summit(look) {
  const { sequence, reverse, weights, shares } = look;
  const patches = reverse ? [] : offered(look).filter((t) => sequence.segmentOf[t].grid);
  if (!patches.length) return null;
  const token = patches.reduce((a, b) => (weights[b] > weights[a] ? b : a));
  const rival = Math.max(0, ...shares.filter((s) => !s.segment.grid).map((s) => s.share));
  const striking = weights[token] * offered(look).length >= 8 && rival <= 2 * weights[token];
  return striking ? { token, share: weights[token] } : null;
}

function headline(look) {
  const { sequence, site, shares, reverse } = look;
  if (!site || !mostOf(shares).share) return "Attention";
  const patch = summit(look);
  if (patch) return `${percent(patch.share)} goes to one patch, ${sequence.title(patch.token)}`;
  const { segment, share } = mostOf(shares);
  return reverse ? `Seen most by ${segment.name}` : `${percent(share)} goes to ${segment.name}`;
}

function sayText(look) {
  const { sequence, reverse, token, site, shares, count } = look;
  const name = sequence.title(token);
  const verb = reverse ? "may be looked at by" : "may look at";
  const all = `${sequence.length} token${sequence.length === 1 ? "" : "s"} of the sequence`;
  const first = `${name} ${verb} ${count ? count : "none"} of ${all}${closedText(look)}.`;
  if (!site) {
    if (!sequence.sites.length) return `${first} No attention was recorded: this is the mask.`;
    return `${first} No attention ${reverse ? "to" : "of"} this token was kept.`;
  }
  const many = offered(look).length;
  const tokens = `${many} token${many === 1 ? "" : "s"}`;
  const shown = reverse ? `${tokens} look${many === 1 ? "s" : ""}` : `it is shown ${tokens}`;
  const where = `At ${site.name} ${shown} (${headText(look)}):`;
  const best = mostOf(shares);
  if (!best.share) return `${first} ${where} ${reverse ? "nobody looks at it" : "it looks at nothing"}.`;
  const even = `(even: ${percent(best.even)})`;
  const each = best.segment.length > 1 ? " each, on average" : "";
  const patch = summit(look);
  const alone = patch ? `, ${percent(patch.share)} to one patch, ${sequence.title(patch.token)}` : "";
  const found = reverse
    ? `it is seen most by ${best.segment.name}: ${percent(best.share)} of the attention there${each} ${even}`
    : `${percent(best.share)} of its attention goes to ${best.segment.name} ${even}${alone}`;
  return `${first} ${where} ${found}.`;
}

// -- panels: each builds its nodes and returns what draws a look on them -----------------------------------

function panel(name, title, ...children) {
  return el("section", { class: `panel ${name}` }, el("h3", {}, title), ...children);
}

// Hover shows a token for the moment, a click, a tap or a drag of the finger keeps it.
function pointed(node, tokenAt, act) {
  const at = (event) => tokenAt(event) ?? null;
  node.addEventListener("pointermove", (event) => {
    if (event.pointerType !== "touch") act.hover(at(event));
    else if (at(event) !== null) act.keep(at(event));
  });
  node.addEventListener("pointerleave", () => act.hover(null));
  node.addEventListener("click", (event) => at(event) !== null && act.keep(at(event)));
}

// Segments without a grid lie in rows, about four times as wide as high.
function columnsFor(length) {
  return length <= 8 ? length : Math.ceil(length / Math.round(Math.sqrt(length) / 2));
}

function ribbonPanel(sequence, data, act) {
  const cells = [];
  const groups = sequence.segments.map((s) => {
    const columns = s.grid ? s.grid[1] : columnsFor(s.length);
    const box = el("div", { class: s.words ? "cells spelled" : "cells", style: `--columns: ${columns}` });
    for (let i = 0; i < s.length; i++) {
      const token = s.start + i;
      const label = `${sequence.title(token)}, ${sequence.place(token)}`;
      cells.push(el("div", { class: "cell", role: "option", tabindex: -1, "data-token": token, "aria-label": label }));
      if (s.words?.[i]) cells[token].setAttribute("data-word", s.words[i]);
      box.append(cells[token]);
    }
    const name = el("div", { class: "label", "aria-hidden": "true" }, el("b", {}, s.name), ` · ${s.length}`);
    const told = `${s.name}, ${s.length} tokens, ${data.kinds[s.kind][1]}`;
    return el(
      "div",
      { class: "group", role: "group", "aria-label": told, style: `--kind: ${data.kinds[s.kind][0]}` },
      name,
      box,
    );
  });
  const node = el("div", { class: "ribbon", role: "listbox", "aria-label": `Tokens of the ${sequence.name}` }, ...groups);
  node.classList.toggle("many", sequence.length > 320);
  const cellAt = (event) => {
    const touched = event.pointerType === "touch" && event.type === "pointermove";
    const target = touched ? node.getRootNode().elementFromPoint(event.clientX, event.clientY) : event.target;
    return target?.dataset?.token === undefined ? null : Number(target.dataset.token);
  };
  pointed(node, cellAt, act);
  node.addEventListener("keydown", (event) => {
    const token = moved(sequence, act.kept(), event);
    if (token === null) return;
    event.preventDefault();
    event.stopPropagation();
    act.keep(token);
    cells[token].focus();
  });
  const draw = (look) => {
    cells.forEach((cell, token) => {
      const strength = look.weights ? Math.sqrt(look.weights[token] / (look.most || 1)) : 1;
      const kept = token === act.kept();
      cell.className = `cell${look.may[token] ? " open" : ""}${token === look.token ? " shown" : ""}${kept ? " kept" : ""}`;
      cell.style.setProperty("--strength", look.may[token] ? strength.toFixed(3) : 0);
      cell.tabIndex = kept ? 0 : -1;
      cell.setAttribute("aria-selected", kept);
    });
  };
  return { node, draw };
}

// Where a key leads from a token; null when it leads nowhere.
function moved(sequence, token, event) {
  const s = sequence.segmentOf[token];
  const all = sequence.segments;
  const columns = s.grid ? s.grid[1] : 1;
  const jump = (by) => all[clamp(all.indexOf(s) + by, 0, all.length - 1)].start;
  const vertical = (by) => {
    const next = token + by * columns;
    return next >= s.start && next < s.start + s.length ? next : token;
  };
  const far = event.ctrlKey || event.metaKey;
  const to = {
    ArrowLeft: () => token - 1,
    ArrowRight: () => token + 1,
    ArrowUp: () => vertical(-1),
    ArrowDown: () => vertical(1),
    Home: () => (far ? 0 : s.start),
    End: () => (far ? sequence.length : s.start + s.length) - 1,
    PageUp: () => jump(-1),
    PageDown: () => jump(1),
    Escape: () => token,
  }[event.key];
  return to ? clamp(to(), 0, sequence.length - 1) : null;
}

function wordsPanel(act) {
  const title = el("h3", { class: "token" });
  const what = el("p", { class: "what" });
  const say = el("p", { class: "say", role: "status", "aria-live": "polite" });
  const step = (by, sign, label) => {
    const button = el("button", { type: "button", "aria-label": label }, sign);
    button.addEventListener("click", () => act.step(by));
    return button;
  };
  const ways = [
    ["to", "what it sees"],
    ["from", "who sees it"],
  ];
  const way = choice("direction", ways, act.reversed() ? "from" : "to", (value) => act.reverse(value === "from"));
  const buttons = el("div", { class: "steps" }, way, step(-1, "‹", "previous token"), step(1, "›", "next token"));
  const told = el("div", { class: "told" }, what, say);
  const node = el("section", { class: "words" }, el("div", { class: "head" }, title, buttons), told);
  const draw = (look) => {
    const { sequence, token, data } = look;
    const s = sequence.segmentOf[token];
    const task = s.kind === "language" && data.task ? ` “${data.task}”` : "";
    const h = act.actionStep(look);
    const action = h === null || !act.asking ? "" : `Step ${h} of the chunk. `;
    title.textContent = sequence.title(token);
    title.style.setProperty("--kind", data.kinds[s.kind][0]);
    const hidden = sum(sequence.may(token, true)) ? "" : " Nobody may look at it.";
    const note = NOTES[s.kind === "image" && !s.grid ? "picture" : s.kind];
    what.textContent = `Position ${token}: ${sequence.place(token)}. ${action}${note}${task}${hidden}`;
    say.textContent = sayText(look);
  };
  return { node, draw };
}

function slider(label, onInput) {
  const input = el("input", { type: "range", min: 0, step: 1, "aria-label": label });
  const output = el("output", {});
  input.addEventListener("input", () => onInput(Number(input.value)));
  const node = el("label", { class: "slider" }, el("span", {}, label), input, output);
  const set = (value, most, text) => {
    input.max = most;
    input.value = value;
    input.disabled = most < 1;
    input.setAttribute("aria-valuetext", text);
    output.textContent = text;
  };
  return { node, set };
}

function choice(legend, options, chosen, onChange) {
  const labels = options.map(([value, text]) => {
    const input = el("input", { type: "radio", name: legend, value });
    input.checked = value === chosen;
    input.addEventListener("change", () => onChange(value));
    return el("label", {}, input, el("span", {}, text));
  });
  return el("fieldset", { class: "choice" }, el("legend", {}, legend), ...labels);
}

function attentionPanel(data, act) {
  const layer = slider("layer", (value) => act.layer(value));
  const head = slider("head", (value) => act.head(value));
  const bars = el("div", { class: "bars" });
  const none = el("p", { class: "none" }, "None was kept for this token in this direction.");
  const asked = el("p", { class: "scale" }, data.asked ?? "");
  const node = panel("attention", "", layer.node, head.node, bars, none, asked);
  const draw = (look) => {
    const { site, sites, chosen } = look;
    node.firstChild.textContent = headline(look);
    for (const part of [layer.node, head.node, bars]) part.hidden = !site;
    none.hidden = Boolean(site);
    bars.replaceChildren();
    if (!site) return;
    layer.set(chosen, sites.length - 1, site.name);
    const most = site.kept > 1 ? site.kept : 0;
    head.set(look.head, most, headText(look));
    const reach = Math.max(...look.shares.flatMap((s) => [s.share, s.even]), 1e-9);
    bars.append(...look.shares.map((s) => bar(s, reach, data)));
    const told = look.reverse ? "what a token of each segment gives it, on average" : "share of its attention";
    bars.append(el("p", { class: "scale" }, `${told}; mark: even`));
  };
  return { node, draw };
}

function bar({ segment, index, share, even }, reach, data) {
  const fill = el("i", { class: "fill", style: `width: ${(100 * share) / reach}%; --kind: ${data.kinds[segment.kind][0]}` });
  const tick = el("i", { class: "even", style: `left: ${(100 * even) / reach}%` });
  return el(
    "div",
    { class: "bar", "data-segment": index, "data-share": share.toFixed(6) },
    el("span", { class: "name" }, segment.name),
    el("span", { class: "track" }, fill, tick),
    el("span", { class: "number" }, percent(share)),
  );
}

// -- pictures ---------------------------------------------------------------------------------------------

const VEIL = 0.5; // how dark a patch without attention is: things on it can still be told by their colours

function picturesPanel(sequence, data, act) {
  const cameras = sequence.segments.filter((s) => s.grid);
  if (!cameras.length) return null;
  const views = cameras.map((s) => camera(s, sequence, data, act));
  const legend = el("p", { class: "scale" });
  const node = panel("pictures", "On the pictures", el("div", { class: "row" }, ...views.map((v) => v.node)), legend);
  const draw = (look) => {
    const patches = cameras.flatMap((s) => Array.from({ length: s.length }, (_, i) => s.start + i));
    const most = look.weights ? Math.max(...patches.map((t) => look.weights[t])) : 0;
    legend.textContent = picturesText(look, most);
    for (const view of views) view.draw(look, most);
  };
  return { node, draw };
}

function picturesText({ weights, reverse, site }, most) {
  if (!weights) return "Clear where it may look, hatched where it may not.";
  if (!most) return `No patch ${reverse ? "looks at it" : "is looked at"} at ${site.name}.`;
  const clear = reverse ? "gives it" : "gets";
  return `The clearer a patch, the more attention it ${clear} (root scale); thin frame: the most, ${percent(most)}.`;
}

function camera(s, sequence, data, act) {
  const image = data.images[s.image];
  const [rows, columns] = s.grid;
  const shape = image ? [image.width, image.height] : [columns, rows];
  const width = 480;
  const height = Math.round((width * shape[1]) / shape[0]);
  const canvas = el("canvas", { width, height });
  const frame = el("div", { class: "frame", role: "img", style: `aspect-ratio: ${shape[0]} / ${shape[1]}` }, canvas);
  if (image) frame.prepend(el("img", { src: image.source, alt: "", class: image.width < 160 ? "coarse" : "" }));
  const caption = el("figcaption", {});
  const tokenAt = (event) => {
    const box = frame.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
    return column < 0 || row < 0 || column >= columns || row >= rows ? null : s.start + row * columns + column;
  };
  pointed(frame, tokenAt, act);
  const draw = (look, most) => {
    drawPatches(canvas.getContext("2d"), s, look, most, [width / columns, height / rows], Boolean(image));
    const { weights, may } = look;
    const own = Array.from({ length: s.length }, (_, i) => s.start + i);
    const open = sum(own.map((t) => may[t]));
    const here = weights ? sum(own.map((t) => weights[t])) : 0;
    const best = weights ? own.reduce((a, b) => (weights[b] > weights[a] ? b : a)) : null;
    const part = look.reverse ? percent(here / s.length) + " a patch" : percent(here);
    const looked = open && weights && isIn(look, s);
    const found = looked ? part : !open ? "all closed" : weights ? "takes no part" : `${open} of ${s.length} open`;
    const summit = looked ? `most: ${sequence.place(best).replace(/ of .*/, "").replace("umn", "")}` : "";
    caption.replaceChildren(el("b", {}, s.name), ` ${found}`, el("span", {}, summit));
    frame.setAttribute("aria-label", `Picture of ${s.name}, ${rows} by ${columns} patches: ${found} ${summit}`);
  };
  return { node: el("figure", {}, frame, caption), draw };
}

const isIn = ({ site, reverse }, s) => (reverse ? site.rowOf : site.columnOf)[s.start] >= 0;

function drawPatches(ink, s, look, most, [wide, high], pictured) {
  ink.clearRect(0, 0, ink.canvas.width, ink.canvas.height);
  const columns = s.grid[1];
  const taking = look.weights && isIn(look, s);
  for (let i = 0; i < s.length; i++) {
    const token = s.start + i;
    const place = [(i % columns) * wide, Math.floor(i / columns) * high, wide, high];
    const strength = taking ? Math.sqrt(look.weights[token] / (most || 1)) : look.weights ? 0.4 : 1;
    if (!look.may[token]) hatch(ink, ...place);
    else if (pictured) veil(ink, `rgba(24, 24, 24, ${(VEIL * (1 - strength)).toFixed(3)})`, place);
    else veil(ink, `rgba(0, 114, 178, ${(0.08 + 0.92 * strength).toFixed(3)})`, place);
  }
  const box = (token) => [((token - s.start) % columns) * wide, Math.floor((token - s.start) / columns) * high, wide, high];
  for (let i = 0; taking && most && i < s.length; i++) {
    if (look.weights[s.start + i] === most) outline(ink, box(s.start + i), 2);
  }
  if (look.sequence.segmentOf[look.token] === s) outline(ink, box(look.token), 8);
}

function veil(ink, colour, place) {
  ink.fillStyle = colour;
  ink.fillRect(...place);
}

function hatch(ink, x, y, wide, high) {
  veil(ink, "rgba(233, 233, 233, 0.72)", [x, y, wide, high]);
  ink.save();
  ink.beginPath();
  ink.rect(x, y, wide, high);
  ink.clip();
  ink.strokeStyle = "#777777";
  ink.lineWidth = 1.5;
  ink.beginPath();
  for (let d = -high; d < wide; d += 12) {
    ink.moveTo(x + d, y + high);
    ink.lineTo(x + d + high, y);
  }
  ink.stroke();
  ink.restore();
}

// A white frame with dark edges, to be seen on any picture.
function outline(ink, [x, y, wide, high], line) {
  for (const [colour, width] of [["#222222", line + 4], ["#FFFFFF", line]]) {
    const inset = (line + 4) / 2;
    ink.strokeStyle = colour;
    ink.lineWidth = width;
    ink.strokeRect(x + inset, y + inset, wide - 2 * inset, high - 2 * inset);
  }
}

// -- the mask ---------------------------------------------------------------------------------------------

const SIDE = 200;

// Borders of the tokens in [0, SIDE]: a segment is as wide as the square root of its length, as in viz.layout.
function edgesOf(sequence) {
  const widths = sequence.segments.map((s) => Math.sqrt(s.length));
  const scale = SIDE / sum(widths);
  const edges = [0];
  sequence.segments.forEach((s, n) => {
    const start = edges[edges.length - 1];
    for (let i = 1; i <= s.length; i++) edges.push(start + (scale * widths[n] * i) / s.length);
  });
  return edges;
}

function maskPicture(sequence, data, edges) {
  const pixels = 2 * SIDE;
  const canvas = el("canvas", { width: pixels, height: pixels });
  const ink = canvas.getContext("2d");
  const picture = ink.createImageData(pixels, pixels);
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const faint = rgb(data.colours.faint);
  const colour = sequence.segmentOf.map((s) => rgb(data.kinds[s.kind][0]));
  const at = [];
  for (let i = 0, token = 0; i < pixels; i++) {
    while (token < sequence.length - 1 && edges[token + 1] <= (i + 0.5) / 2) token++;
    at.push(token);
  }
  for (let y = 0; y < pixels; y++) {
    for (let x = 0; x < pixels; x++) {
      picture.data.set([...(sequence.sees(at[y], at[x]) ? colour[at[x]] : faint), 255], 4 * (y * pixels + x));
    }
  }
  ink.putImageData(picture, 0, 0);
  return canvas.toDataURL();
}

function maskPanel(sequence, data, act) {
  const edges = edgesOf(sequence);
  const left = 84;
  const rules = el("g", { class: "rules" });
  const names = el("g", { class: "names" });
  let below = 0;
  for (const s of sequence.segments) {
    const [top, bottom] = [edges[s.start], edges[s.start + s.length]];
    for (const at of [top, bottom]) {
      rules.append(el("path", { d: `M${left} ${at}h${SIDE}M${left + at} 0v${SIDE}` }));
    }
    const y = Math.max((top + bottom) / 2 + 3.5, below + 10.5);
    below = y;
    const name = s.name.length > 13 ? `${s.name.slice(0, 12)}…` : s.name;
    if (y <= SIDE + 4) names.append(el("text", { x: left - 5, y, "text-anchor": "end" }, name));
  }
  const image = el("image", { href: maskPicture(sequence, data, edges), x: left, y: 0, width: SIDE, height: SIDE });
  const band = el("g", { class: "band" });
  const svg = el("svg", { viewBox: `-1 -6 ${left + SIDE + 3} ${SIDE + 12}`, role: "img" }, image, rules, names, band);
  const tokenAt = (event) => {
    const box = image.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top].map((d) => (d / box.width) * SIDE);
    if (x < 0 || y < 0 || x >= SIDE || y >= SIDE) return null;
    const along = act.reversed() ? x : y;
    return edges.findIndex((edge) => edge > along) - 1;
  };
  pointed(svg, tokenAt, act);
  const closed = el("p", { class: "scale" });
  const legend = el("p", { class: "scale" }, "The whole sequence: rows look, columns are looked at, in the same order. Filled: may. A site may show fewer.");
  const node = panel("mask", "", svg, closed, legend);
  const draw = (look) => {
    band.replaceChildren(...bandOf(look, edges, left, data));
    const verb = look.reverse ? "May be looked at by" : "May look at";
    node.firstChild.textContent = `${verb} ${look.count} of ${sequence.length} tokens`;
    closed.textContent = closedText(look).slice(2) || "nothing is closed to it";
    svg.setAttribute("aria-label", `Mask, ${sequence.length} by ${sequence.length}. ${look.reverse ? "Column" : "Row"} of ${sequence.title(look.token)}: ${look.count} open`);
  };
  return { node, draw };
}

// The row of a token (its column, in reverse), tall enough to be seen, over the picture; runs of open places
// are filled.
function bandOf({ sequence, reverse, token, may }, edges, left, data) {
  const middle = (edges[token] + edges[token + 1]) / 2;
  const tall = Math.max(6, edges[token + 1] - edges[token]);
  const from = clamp(middle - tall / 2, 0, SIDE - tall);
  const box = (start, stop, low, high, more) =>
    reverse
      ? el("rect", { x: left + low, y: start, width: high - low, height: stop - start, ...more })
      : el("rect", { x: left + start, y: low, width: stop - start, height: high - low, ...more });
  const parts = [box(0, SIDE, from - 1.5, from + tall + 1.5, { class: "edge" }), box(0, SIDE, from, from + tall, { fill: data.colours.paper })];
  for (let start = 0; start < sequence.length; ) {
    let stop = start + 1;
    const s = sequence.segmentOf[start];
    while (stop < sequence.length && may[stop] === may[start] && sequence.segmentOf[stop] === s) stop++;
    const more = { class: "open", fill: data.kinds[s.kind][0], "data-open": `${start}-${stop}` };
    if (may[start]) parts.push(box(edges[start], edges[stop], from, from + tall, more));
    start = stop;
  }
  return parts;
}

// -- the whole --------------------------------------------------------------------------------------------

function build(data) {
  const sequences = data.sequences.map((sequence) => new Tokens(sequence));
  const state = {
    sequence: sequences[0],
    kept: data.start,
    hovered: null,
    reverse: false,
    head: 0,
    layer: new Map(),
    unit: data.chunk?.units.robot ? "robot" : "normalised",
    step: data.chunk ? data.chunk.units.normalised.length - 1 : 0,
    mark: data.chunk?.returned?.[0] ?? 0, // a step of the chunk, where no token stands for it
    hoveredMark: null,
    point: null, // a keypoint
    hoveredPoint: null,
  };
  let panels = [];
  const settle = () => steady(panels.filter((part) => !part.node.matches(".ribbon")).map((part) => part.node));
  const draw = () => {
    const look = lookOf(state, data);
    for (const part of panels) part.draw(look);
    settle();
  };
  const change = (values) => {
    if (Object.entries(values).every(([name, value]) => state[name] === value)) return;
    Object.assign(state, values);
    draw();
  };
  const act = actions(data, state, sequences, change);
  const card = el("section", { class: "card", "aria-label": data.title }, el("h2", {}, data.title));
  const body = el("div", { class: "body" });
  const attention = attentionPanel(data, act);
  const scene = scenePanels(data, state, act);
  const show = (parts) => {
    panels = parts.filter(Boolean);
    body.replaceChildren(...panels.map((part) => part.node).filter((node) => !node.matches(".ribbon, .words")));
  };
  if (sequences.length) {
    const ribbon = el("div", {});
    const words = wordsPanel(act);
    const open = (sequence) => {
      const cells = ribbonPanel(sequence, data, act);
      ribbon.replaceChildren(cells.node, legend(sequence));
      const shares = sequence.sites.length ? attention : null;
      const own = sequence === sequences[0] ? scene : {};
      const mask = maskPanel(sequence, data, act);
      const pictures = picturesPanel(sequence, data, act);
      show([cells, words, pictures, own.views, shares, mask, own.chunk, own.codes, own.condition]);
    };
    if (sequences.length > 1) card.append(sequenceChoice(sequences, (i) => {
      Object.assign(state, { sequence: sequences[i], kept: i ? 0 : data.start, hovered: null });
      open(sequences[i]);
      draw();
    }));
    card.append(ribbon, words.node);
    open(sequences[0]);
  } else {
    show([scene.views, scene.chunk, scene.condition]);
  }
  card.append(body, notes(data));
  draw();
  let width = 0;
  new ResizeObserver(() => {
    if (card.clientWidth === width) return;
    width = card.clientWidth;
    for (const part of panels) part.node.style.minHeight = "";
    settle();
  }).observe(card);
  return card;
}

// A panel never gets lower: what is pointed at must not move away when a text above it gets shorter.
function steady(nodes) {
  for (const node of nodes) {
    node.style.minHeight = `${Math.ceil(node.getBoundingClientRect().height)}px`;
  }
}

// What panels may do; each change is drawn at once.
function actions(data, state, sequences, change) {
  const [main] = sequences;
  const steps = data.chunk ? data.chunk.units.normalised[0].length : 0;
  const asking = main?.segments.filter((s) => ["query", "action"].includes(s.kind) && s.length === steps).pop();
  return {
    hover: (token) => change({ hovered: token }),
    keep: (token) => change({ kept: token, hovered: null }),
    step: (by) => change({ kept: clamp(state.kept + by, 0, state.sequence.length - 1), hovered: null }),
    kept: () => state.kept,
    reverse: (reverse) => change({ reverse }),
    reversed: () => state.reverse,
    head: (head) => change({ head }),
    layer: (value) => {
      const sites = state.sequence.sitesOf(state.kept, state.reverse);
      change({ layer: new Map(state.layer).set(sites.map((site) => site.name).join(), value) });
    },
    unit: (unit) => change({ unit }),
    sampler: (step) => change({ step }),
    asking,
    // A step of the chunk: the token that becomes it, or a mark of its own.
    actionStep: ({ sequence, token }) => {
      if (!asking) return state.hoveredMark ?? state.mark;
      return sequence.segmentOf[token] === asking ? token - asking.start : null;
    },
    hoverStep: (h) => change(asking ? { hovered: h === null ? null : asking.start + h } : { hoveredMark: h }),
    keepStep: (h) => change(asking ? { kept: asking.start + h, hovered: null } : { mark: h, hoveredMark: null }),
    // A place in a picture: a keypoint, and the token that the picture became.
    hoverPlace: (place) => change({ hoveredPoint: place?.point ?? null, hovered: place?.token ?? null }),
    keepPlace: ({ point, token }) => change({ point, hoveredPoint: null, hovered: null, kept: token ?? state.kept }),
    keepPoint: (point) => change({ point, hoveredPoint: null }),
    point: () => state.hoveredPoint ?? state.point,
  };
}

function sequenceChoice(sequences, onChange) {
  const select = el("select", {});
  sequences.forEach((s, i) => select.append(el("option", { value: i }, `${s.name}, ${s.length} tokens`)));
  select.addEventListener("change", () => onChange(Number(select.value)));
  return el("label", { class: "sequence" }, "Sequence ", select);
}

function legend(sequence) {
  const key = (name, text) => el("span", { class: "key" }, el("i", { class: `cell ${name}`, "aria-hidden": "true" }), text);
  const open = sequence.sites.length
    ? [key("open full", "looked at: the larger, the more (root scale)"), key("open", "may look, hardly does")]
    : [key("open full", "may look")];
  return el("p", { class: "legend" }, ...open, key("", "may not look"));
}

function notes(data) {
  const list = data.left_out.map((said) => el("li", {}, said));
  const tokens =
    " Keys: arrows move, Home and End go to the ends of a segment, Page Up and Page Down to the next segment." +
    " Weights are stored in 255 steps.";
  const keys = `Hover to look, click or tap to keep.${data.sequences.length ? tokens : ""} Counts start at 0.`;
  const node = el("footer", {}, el("p", {}, keys));
  if (list.length) node.prepend(el("p", { class: "left-out" }, "Left out, to keep the page small:"), el("ul", {}, ...list));
  return node;
}

function wake(host) {
  const data = JSON.parse(host.querySelector('script[type="application/json"]').textContent);
  const card = build(data);
  const style = el("style", {});
  style.textContent = data.css;
  // JupyterLab would take the arrow keys for its own
  host.setAttribute("data-lm-suppress-shortcuts", "true");
  host.setAttribute("data-awake", "");
  host.attachShadow({ mode: "open" }).append(style, card);
  host.querySelector(":scope > div").remove();
}

// Some notebooks run a script before its container is on the page, so it is looked for again for a second.
function awaken(key, tries = 60) {
  const hosts = document.querySelectorAll(`[data-minivla-explorer="${key}"]:not([data-awake])`);
  hosts.forEach(wake);
  if (!hosts.length && tries) requestAnimationFrame(() => awaken(key, tries - 1));
}
