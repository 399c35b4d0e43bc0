// What an explorer shows beside the tokens: the chunk on its way from noise, the pictures with their keypoints,
// the codes, what the network was told. Goes with explorer.js, whose tools it uses.

function scenePanels(data, state, act) {
  return {
    views: viewsPanel(data, act),
    chunk: chunkPanel(data, state, act),
    codes: codesPanel(data),
    condition: conditionPanel(data),
  };
}

// -- the chunk --------------------------------------------------------------------------------------------

const PLOT = { width: 200, height: 110, left: 6, right: 6, top: 6, bottom: 6 };

// The chunk that a look shows, in all its versions: the steps of a sampler, or with codes [decoded, chunk].
function versionsOf(data, state, look) {
  const said = answerOf(data, look);
  if (said === null) return data.chunk.units[state.unit];
  return [data.answers.decoded[state.unit][said], data.answers.units[state.unit][said]];
}

// Which query's answer is shown: the chosen token's, or the one that the policy returned.
function answerOf({ answers }, { token }) {
  if (!answers) return null;
  const own = answers.tokens.indexOf(token);
  return own < 0 ? answers.of : own;
}

function chunkPanel(data, state, act) {
  const { chunk, answers } = data;
  if (!chunk) return null;
  const horizon = chunk.units.normalised[0].length;
  const plots = chunk.names.map((name, i) => plot(name, i, horizon, chunk, act));
  const grid = el("div", { class: "plots" }, ...plots.map((p) => p.node));
  const steps = chunk.units.normalised.length - 1;
  const sampler = slider("sampler", (value) => act.sampler(value));
  const play = player(state, steps, act);
  const place = slider("action", (value) => act.keepStep(value));
  const units = choice(
    "units",
    [
      ["robot", "robot units"],
      ["normalised", "normalised"],
    ],
    state.unit,
    (value) => act.unit(value),
  );
  const told = el("p", { class: "scale" });
  const controls = el("div", { class: "controls" });
  if (chunk.times) controls.append(sampler.node, play.node);
  if (!act.asking) controls.append(place.node);
  if (chunk.units.robot) controls.append(units);
  const node = panel("chunk", "The chunk", controls, grid, told);
  node.classList.toggle("few", !data.sequences.length && plots.length <= 4);
  const draw = (look) => {
    const h = act.actionStep(look);
    if (chunk.times) {
      sampler.set(state.step, steps, samplerText(chunk, state.step));
      play.draw();
    }
    place.set(h ?? 0, horizon - 1, `step ${h} of the chunk, ${horizon} in all`);
    const versions = versionsOf(data, state, look);
    const all = answers ? [...answers.units[state.unit], ...answers.decoded[state.unit]] : versions;
    for (const p of plots) p.draw(versions, chunk.times ? state.step : versions.length - 1, h, all);
    told.textContent = chunkText(data, state, look, h, act);
  };
  return { node, draw };
}

function samplerText({ times, steps, of }, step) {
  const time = times[step] < 0 ? "no noise left" : `time ${short(times[step])}`;
  return `step ${steps[step]} of ${of}, ${time}`;
}

function chunkText(data, state, look, h, act) {
  const { chunk, answers } = data;
  const said = [`${chunk.units.normalised[0].length} steps, ${state.unit === "robot" ? "robot units" : "normalised"}.`];
  if (answers) {
    const name = look.sequence.title(answers.tokens[answerOf(data, look)]);
    said.push(`What ${name} says: dashed, what its codes decode to; full, with the offset.`);
  } else if (chunk.times) said.push("Dashed: the result.");
  if (chunk.returned) {
    const [first, count] = chunk.returned;
    said.push(`White: steps ${first} to ${first + count - 1}, which the policy returned.`);
  }
  if (act.asking) {
    const marked = h !== null && `Marked: step ${h}, what ${look.sequence.title(look.token)} becomes.`;
    said.push(marked || "Point at a place of the chunk.");
  }
  return said.join(" ");
}

// A button that lets the sampler run, about two seconds from noise to result.
function player(state, steps, act) {
  const node = el("button", { type: "button", class: "play" });
  let clock = null;
  const stop = () => {
    clearInterval(clock);
    clock = null;
    draw();
  };
  const draw = () => {
    node.textContent = clock === null ? "play" : "stop";
    node.setAttribute("aria-label", clock === null ? "play the sampler" : "stop the sampler");
  };
  node.addEventListener("click", () => {
    if (clock !== null) return stop();
    if (state.step === steps) act.sampler(0);
    clock = setInterval(() => {
      if (state.step >= steps || !node.isConnected) stop();
      else act.sampler(state.step + 1);
    }, clamp(2000 / Math.max(steps, 1), 40, 250));
    draw();
  });
  return { node, draw };
}

function plot(name, dimension, horizon, chunk, act) {
  const { width, height, left, right, top, bottom } = PLOT;
  const svg = el("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  const number = el("span", { class: "number" });
  const ends = el("span", { class: "ends" });
  const head = el("div", { class: "head" }, el("b", {}, name), number);
  const x = (h) => left + ((width - left - right) * h) / Math.max(horizon - 1, 1);
  const stepAt = (event) => {
    const box = svg.getBoundingClientRect();
    const along = ((event.clientX - box.left) / box.width) * width;
    return clamp(Math.round(((along - left) / (width - left - right)) * (horizon - 1)), 0, horizon - 1);
  };
  pointed(svg, stepAt, { hover: act.hoverStep, keep: act.keepStep });
  const draw = (versions, chosen, h, scaled) => {
    const own = (chunks) => chunks.map((step) => step.map((action) => action[dimension]));
    const steps = own(versions);
    const all = own(scaled).flat().filter((v) => v !== null);
    const [low, high] = all.length ? [Math.min(...all), Math.max(...all)] : [0, 0];
    const y = (v) => height - bottom - ((height - top - bottom) * (v - low)) / (high - low || 1);
    const now = steps[chosen];
    const parts = [];
    if (chunk.returned) parts.push(...outsides(chunk.returned, horizon, x));
    if (low < 0 && high > 0) parts.push(el("path", { class: "zero", d: `M${left} ${y(0)}H${width - right}` }));
    const other = chunk.times ? steps.length - 1 : 0;
    if (steps.length > 1) parts.push(el("path", { class: "result", d: line(steps[other], x, y) }));
    parts.push(el("path", { class: "now", d: line(now, x, y) }));
    now.forEach((v, i) => horizon <= 64 && v !== null && parts.push(el("circle", { class: "dot", cx: x(i), cy: y(v), r: 1.7 })));
    if (h !== null) {
      parts.push(el("path", { class: "mark", d: `M${x(h)} 0V${height}` }));
      if (now[h] !== null) parts.push(el("circle", { class: "mark", cx: x(h), cy: y(now[h]), r: 4 }));
    }
    svg.replaceChildren(...parts);
    number.textContent = h === null ? "" : short(now[h]);
    ends.textContent = `${short(low)} to ${short(high)}`;
    const at = h === null ? "" : `, ${short(now[h])} at step ${h}`;
    svg.setAttribute("aria-label", `${name} over ${horizon} steps, from ${short(low)} to ${short(high)}${at}`);
  };
  return { node: el("div", { class: "plot" }, head, svg, ends), draw };
}

// A line through what is a number; where something is not, it is broken.
function line(values, x, y) {
  const known = (v) => v !== null && v !== undefined;
  return values.map((v, i) => (known(v) ? `${known(values[i - 1]) ? "L" : "M"}${x(i).toFixed(1)} ${y(v).toFixed(1)}` : "")).join("");
}

// Grey over the steps that the policy did not return.
function outsides([first, count], horizon, x) {
  const middle = (h) => (x(h - 1) + x(h)) / 2;
  const from = first ? middle(first) : 0;
  const to = first + count < horizon ? middle(first + count) : PLOT.width;
  return [[0, from], [to, PLOT.width]].map(([start, stop]) =>
    el("rect", { class: "outside", x: start, y: 0, width: stop - start, height: PLOT.height }),
  );
}

// -- pictures with keypoints ------------------------------------------------------------------------------

const NEAR = 0.12; // of the picture's width: how far from a keypoint a pointer still means it

function viewsPanel(data, act) {
  if (!data.views.length) return null;
  const count = Math.max(...data.views.map((v) => v.points?.length ?? 0));
  const shown = data.views.map((v) => view(v, data, act));
  const names = [...new Set(data.views.map((v) => v.camera))];
  const rows = names.map((name) => {
    const own = shown.filter((_, i) => data.views[i].camera === name);
    return el("div", { class: "history", style: `--columns: ${own.length}` }, ...own.map((v) => v.node));
  });
  const point = slider("keypoint", (value) => act.keepPoint(value ? value - 1 : null));
  const said = el("p", { class: "scale", role: "status", "aria-live": "polite" });
  const title = count ? `What it sees: ${count} keypoints in a picture` : "What it sees";
  const node = panel("views", title, ...rows, ...(count ? [point.node] : []), said);
  const draw = (look) => {
    const k = act.point();
    for (const v of shown) v.draw(look, k);
    point.set(k === null ? 0 : k + 1, count, k === null ? "none is marked" : `number ${k}, of ${count}`);
    said.textContent = pointText(data, k);
  };
  return { node, draw };
}

const whenText = (ago) => (ago ? `${ago} step${ago > 1 ? "s" : ""} before` : "now");

function pointText({ views }, k) {
  const encoders = new Set(views.map((v) => v.encoder)).size;
  if (views.some((v) => v.drawn)) return "The crop of a training pass was drawn and not kept: nobody knows where the keypoints lie.";
  if (!views.some((v) => v.points)) return "";
  const apart = encoders > 1 ? " Each camera has its own encoder: there, the same number is another keypoint." : "";
  if (k === null) {
    return `A dot is the middle of what one heat map lights up. Point at one: it is marked in every picture.${apart}`;
  }
  const places = views.flatMap((v) => {
    const at = v.points?.[k];
    if (!at || at.includes(null)) return [];
    return [`${v.camera} ${whenText(v.ago)}: ${at.map((share) => Math.round(100 * share)).join(", ")}`];
  });
  return `Keypoint ${k}, in % from left and top: ${places.join("; ") || "nowhere"}.${apart}`;
}

function view(v, data, act) {
  const tall = (100 * v.height) / v.width;
  const dots = (v.points ?? []).map(([x, y]) =>
    x === null || y === null ? null : el("circle", { class: "point", cx: 100 * x, cy: tall * y, r: 1.7 }),
  );
  const overlay = el("svg", { viewBox: `0 0 100 ${tall}`, "aria-hidden": "true" }, ...dots.filter(Boolean));
  const image = el("img", { src: v.source, alt: "", class: v.width < 160 ? "coarse" : "" });
  const frame = el("div", { class: "frame", role: "img", style: `aspect-ratio: ${v.width} / ${v.height}` }, image, overlay);
  const caption = el("figcaption", {});
  const placeAt = (event) => {
    const box = frame.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    if (x < 0 || y < 0 || x > 1 || y > 1) return null;
    const away = ([px, py]) => (px === null || py === null ? Infinity : Math.hypot(px - x, ((py - y) * tall) / 100));
    const far = (v.points ?? []).map(away);
    const nearest = far.indexOf(Math.min(...far));
    return { point: far[nearest] <= NEAR ? nearest : null, token: v.token };
  };
  // What moves within one place is no change: places are compared by what they hold.
  pointed(frame, placeAt, { hover: act.hoverPlace, keep: act.keepPlace });
  const draw = (look, k) => {
    dots.forEach((dot, i) => {
      dot?.setAttribute("class", i === k ? "point marked" : "point");
      dot?.setAttribute("r", i === k ? 3.4 : 1.7);
    });
    if (k !== null && dots[k]) overlay.append(dots[k]); // the last is drawn on top
    const found = v.token === null ? "" : shareText(look, v.token);
    frame.classList.toggle("shut", v.token !== null && !look.may[v.token]);
    frame.classList.toggle("shown", v.token !== null && look.token === v.token);
    caption.replaceChildren(el("b", {}, v.camera), ` ${whenText(v.ago)}`, ...(found ? [el("span", {}, found)] : []));
    frame.setAttribute("aria-label", `Picture of ${v.camera}, ${whenText(v.ago)}. ${dots.length} keypoints. ${found}`);
  };
  return { node: el("figure", {}, frame, caption), draw };
}

// What the token that a picture became has to do with the chosen one.
function shareText({ may, weights, reverse, token }, own) {
  if (token === own) return "this token";
  if (!may[own]) return "closed";
  if (!weights) return "open";
  return `${reverse ? "gives it" : "gets"} ${percent(weights[own])}`;
}

// -- codes ------------------------------------------------------------------------------------------------

function codesPanel(data) {
  const { answers } = data;
  if (!answers) return null;
  const levels = answers.codes[0].map((_, level) => codeBars(answers, level));
  const meant = "Bars: the classifier's shares, before the temperature that codes are drawn with; vermilion: drawn.";
  const told = el("p", { class: "scale" }, meant);
  const node = panel("codes", "", el("div", { class: "levels" }, ...levels.map((l) => l.node)), told);
  const draw = (look) => {
    const said = answerOf(data, look);
    const name = look.sequence.title(answers.tokens[said]);
    node.firstChild.textContent = `Codes of ${name}: ${answers.codes[said].join(" · ")}`;
    for (const level of levels) level.draw(said);
  };
  return { node, draw };
}

function codeBars(answers, level) {
  const [width, height] = [200, 54];
  const svg = el("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  const head = el("span", { class: "ends" });
  const draw = (said) => {
    const shares = answers.shares[said][level];
    const drawn = answers.codes[said][level];
    const wide = width / shares.length;
    svg.replaceChildren(
      ...shares.map((share, code) => {
        const tall = Math.max(1, (height - 2) * (share ?? 0));
        const kind = code === drawn ? "code drawn" : "code";
        return el("rect", { class: kind, x: code * wide + 1, y: height - tall, width: Math.max(wide - 2, 1), height: tall });
      }),
    );
    head.textContent = `level ${level}: code ${drawn} of ${shares.length}, ${percent(shares[drawn] ?? 0)}`;
    svg.setAttribute("aria-label", head.textContent);
  };
  return { node: el("div", { class: "level" }, head, svg), draw };
}

// -- what the network was told ----------------------------------------------------------------------------

function conditionPanel(data) {
  if (!data.condition.length) return null;
  const rows = data.condition.map((part) => conditionRow(part, data));
  const history = data.condition[0].values.length;
  const order = history > 1 ? ` Rows: ${history} observations, the newest at the bottom.` : "";
  const told = `One column a number: red above 0, blue below, strongest for the part's largest.${order}`;
  const node = panel("condition", "What the network is told", ...rows, el("p", { class: "scale" }, told));
  return { node, draw: () => {} };
}

function conditionRow({ name, values }, data) {
  const width = values[0].length;
  const most = Math.max(...values.flat().map((v) => Math.abs(v ?? 0)), 1e-9);
  const canvas = el("canvas", { width, height: values.length, role: "img" });
  const ink = canvas.getContext("2d");
  values.forEach((row, y) =>
    row.forEach((v, x) => {
      ink.fillStyle = v === null ? "#a6a6a6" : tint(v / most);
      ink.fillRect(x, y, 1, 1);
    }),
  );
  const newest = values[values.length - 1];
  const numbers = width <= 8 ? newest.map(short).join(", ") : `${width} numbers`;
  const task = name === "instruction" && data.task ? ` “${data.task}”` : "";
  canvas.setAttribute("aria-label", `${name}: ${values.length} observations of ${width} numbers`);
  return el("div", { class: "told-part" }, el("div", { class: "part-name" }, el("b", {}, name), `${task} · ${numbers}`), canvas);
}

// From blue over white to red, for -1 to 1.
function tint(share) {
  const end = share < 0 ? [33, 102, 172] : [178, 24, 43];
  return `rgb(${end.map((c) => Math.round(255 + (c - 255) * Math.min(Math.abs(share), 1))).join(", ")})`;
}
