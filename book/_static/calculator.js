// The memory calculator: asks `peftlab.memory` itself, which runs in a worker (calculator_worker.mjs) once the reader
// starts it. The page's part is the form, the pictures, the command and the link; it computes no number of its own.
// tests/book/test_calculator_page.py compares what it shows with the package.
"use strict";

(function () {
  const root = document.getElementById("calc");
  if (!root) return;
  const data = JSON.parse(document.getElementById("calc-data").textContent);
  const WORKER = new URL("calculator_worker.mjs", document.currentScript.src);
  const at = (name) => document.getElementById(`calc-${name}`);
  const form = at("form");
  const fields = [...form.querySelectorAll("[data-kind]")];
  const PASTED = "pasted", NAMED = "named";
  const WAIT = 120;  // milliseconds without a key stroke, before a question is asked
  const SLOW = 400;  // milliseconds after which the page says that it computes
  const PAUSE = 250;  // before the curve is asked for: a reader may still be changing settings

  // ------------------------------------------------------------------------------------------------ the question

  const fieldOf = (name) => form.querySelector(`[name="${name}"]`);
  const boxOf = (name) => form.querySelector(`[data-field="${name}"]`);

  function numberIn(input) {
    if (input.validity.badInput) return "not a number";
    return input.value.trim() === "" ? null : Number(input.value);
  }

  function valueOf(input) {
    if (input.dataset.kind === "number") return numberIn(input);
    if (input.dataset.kind === "switch") return { yes: true, no: false }[input.value] ?? null;
    return input.value;
  }

  function targets() {
    const chosen = fieldOf("targets").value;
    if (chosen !== NAMED) return chosen || null;
    return fieldOf("names").value.split(",").map((name) => name.trim()).filter(Boolean);
  }

  // What the form says, as arguments of peftlab.memory.estimate. What is as by default is left out.
  function question() {
    const shape = fieldOf("shape").value;
    const asked = { shape: shape === PASTED ? { config: fieldOf("config").value } : shape, method: fieldOf("method").value };
    for (const [name, usual] of Object.entries(data.defaults)) {
      const input = fieldOf(name);
      if (name === "method" || !input || boxOf(name).hidden) continue;
      const value = name === "targets" ? targets() : valueOf(input);
      if (value !== usual) asked[name] = value;
    }
    return asked;
  }

  // Shows the fields that the chosen method and model have
  function arrange() {
    const method = fieldOf("method").value, shape = fieldOf("shape").value;
    const takes = data.takes[method];
    for (const box of form.querySelectorAll("[data-option]")) box.hidden = !takes.includes(box.dataset.option);
    boxOf("config").hidden = shape !== PASTED;
    boxOf("names").hidden = boxOf("targets").hidden || fieldOf("targets").value !== NAMED;
    boxOf("parallel").hidden = fieldOf("gpus").value === "1";
    fieldOf("r").placeholder = data.ranks[method] ?? "";
  }

  // ------------------------------------------------------------------------------- the same question, elsewhere

  const literal = (value) => (value === true ? "True" : value === false ? "False" : value === null ? "None"
    : Array.isArray(value) ? `[${value.map(literal).join(", ")}]` : JSON.stringify(value));
  const word = (value) => (value !== null && /^[\w.,:/@%+=-]+$/.test(value) ? value : `'${String(value ?? "").replaceAll("'", "'\\''")}'`);
  const placeOf = (shape) => (typeof shape === "string" ? shape : "config.json");

  function command({ shape, method, ...rest }) {
    const words = ["peftlab memory", placeOf(shape), "--method", method];
    for (const [name, value] of Object.entries(rest)) {
      const flag = name.replaceAll("_", "-");
      if (typeof value === "boolean") words.push(value ? `--${flag}` : `--no-${flag}`);
      else words.push(`--${flag}`, word(Array.isArray(value) ? value.join(",") : value));
    }
    return words.join(" ");
  }

  function call({ shape, method, ...rest }) {
    const given = [literal(placeOf(shape)), literal(method)];
    for (const [name, value] of Object.entries(rest)) given.push(`${name}=${literal(value)}`);
    return `import peftlab as pl\n\nprint(pl.memory.estimate(${given.join(", ")}))`;
  }

  function compact(text) {
    try {
      return JSON.stringify(JSON.parse(text));
    } catch {
      return text;
    }
  }

  function fragment({ shape, ...rest }) {
    const found = new URLSearchParams(typeof shape === "string" ? { shape } : { config: compact(shape.config) });
    for (const [name, value] of Object.entries(rest)) {
      found.set(name, value === true ? "yes" : value === false ? "no" : value === null ? "" : String(value));
    }
    return `#${found}`;
  }

  // Puts the settings of a link into the form. Every other setting is as by default.
  function restore(text) {
    const found = new URLSearchParams(text.replace(/^#/, ""));
    if (!found.has("shape") && !found.has("config")) return false;
    for (const input of fields) input.value = usual(input.name);
    for (const [name, value] of found) {
      const input = fieldOf(name);
      if (name === "targets" && value !== "all-linear") {
        fieldOf("targets").value = NAMED;
        fieldOf("names").value = value;
      } else if (input && input.dataset.kind) {
        input.value = value;
        if (input.closest("details")) input.closest("details").open = true;
      }
    }
    if (found.has("config")) fieldOf("shape").value = PASTED;
    arrange();
    return true;
  }

  function usual(name) {
    const value = data.defaults[name];
    if (name === "shape") return data.shapes[0];
    return value === null || value === undefined ? "" : value === true ? "yes" : value === false ? "no" : String(value);
  }

  // ------------------------------------------------------------------------------------------- asking the worker

  let worker = null, ready = false, serial = 0, asked = null;
  const waiting = new Map();  // by the number of the question: what to do with its answer

  function ask(kind, given) {
    return new Promise((resolve, reject) => {
      serial += 1;
      waiting.set(serial, { resolve, reject });
      worker.postMessage({ id: serial, kind, question: given });
    });
  }

  function received({ data: message }) {
    if (message.loaded !== undefined) return progress(message.loaded);
    if (message.ready) return begin();
    if (message.id === undefined) return broken(message.failed);
    const { resolve, reject } = waiting.get(message.id);
    waiting.delete(message.id);
    if (message.failed) reject(new Error(message.failed));
    else resolve(message);
  }

  function impossible() {
    if (location.protocol === "file:") {
      return "This page was opened as a file, and browsers start no Python from files. The other pages work as usual.";
    }
    if (typeof WebAssembly !== "object" || typeof Worker !== "function") {
      return "This browser has no WebAssembly, which the calculator needs.";
    }
    if (typeof DecompressionStream !== "function") return "This browser is too old for the calculator.";
    return null;
  }

  function refuse(reason) {
    at("start").hidden = true;
    at("refused").textContent = `${reason} The command below gives the same answer in a shell.`;
    at("refused").hidden = false;
  }

  function broken(reason) {
    if (worker) worker.terminate();
    worker = null;
    ready = false;
    at("result").hidden = true;
    refuse(`The calculator could not run here (${reason}).`);
  }

  function load() {
    at("load").disabled = true;
    at("progress").hidden = false;
    say("Python is being loaded.");
    try {
      worker = new Worker(WORKER, { type: "module" });
    } catch (error) {
      return broken(error.message);
    }
    worker.onmessage = received;
    worker.onerror = (event) => {
      event.preventDefault();
      broken(event.message || "its files were not loaded");
    };
  }

  const TOTAL = Object.values(data.sizes).reduce((sum, size) => sum + size, 0);

  function progress(loaded) {
    const share = Math.min(1, loaded / TOTAL);
    at("bar").value = share;
    at("loaded").textContent = share < 1
      ? `Python is being loaded: ${bytes(loaded)} of ${bytes(TOTAL)}` : "Python is there, and is starting.";
  }

  async function begin() {
    ready = true;
    at("loaded").textContent = "Python runs. Here comes the first answer.";
    const there = document.activeElement;  // a button that is switched off or hidden loses the focus
    await answer();
    at("start").hidden = true;
    if (there === document.body || there === at("load")) at("result").focus({ preventScroll: true });
  }

  // ------------------------------------------------------------------------------------------------- the answer

  let curve = 0;  // the number of the curve that is being asked for

  // Asks the question of the form and shows its answer, or the package's error at the field that it is about
  async function answer() {
    const given = question();
    asked = given;
    curve += 1;
    let message;
    at("result").setAttribute("aria-busy", "true");
    const slow = setTimeout(() => { at("short").textContent = at("busy").textContent = "Computing."; }, SLOW);
    try {
      message = await ask("answer", given);
    } catch (error) {
      return broken(error.message);
    } finally {
      clearTimeout(slow);
    }
    if (asked !== given) return undefined;  // the settings have changed meanwhile
    at("result").removeAttribute("aria-busy");
    at("busy").textContent = "";
    clearErrors();
    if (message.answer.error) return showError(message.answer);
    show(given, message.answer);
    setTimeout(() => askCurve(given, message.answer), PAUSE);
    return message;
  }

  async function askCurve(given, found) {
    const mine = curve;
    const lengths = [...new Set([...found.lengths, given.sequence ?? data.defaults.sequence])].sort((a, b) => a - b);
    const points = [];
    for (const sequence of lengths) {
      if (mine !== curve || asked !== given) return;
      const { answer: one } = await ask("point", { ...given, sequence });
      if (one) points.push({ sequence, ...one });
    }
    if (mine === curve && asked === given) showCurve(points, given.sequence ?? data.defaults.sequence);
  }

  let timer = 0;

  function changed() {
    arrange();
    showElsewhere();
    history.replaceState(null, "", fragment(question()));
    clearTimeout(timer);
    if (ready) timer = setTimeout(answer, WAIT);
  }

  function showElsewhere() {
    const given = question();
    at("command").textContent = command(given);
    at("call").textContent = call(given);
    at("link").textContent = location.href.split("#")[0] + fragment(given);
    at("save").hidden = typeof given.shape === "string";
    at("elsewhere").hidden = false;
  }

  function clearErrors() {
    for (const box of form.querySelectorAll(".calc-error")) box.hidden = true;
    for (const input of fields) input.removeAttribute("aria-invalid");
    at("old").hidden = true;
    at("result").classList.remove("calc-outdated");
  }

  function showError({ error, field }) {
    let name = field === "shape" && !boxOf("config").hidden ? "config" : field;
    if (name === "targets" && !boxOf("names").hidden) name = "names";
    if (!boxOf(name) || boxOf(name).hidden) name = "method";
    const told = boxOf(name).querySelector(".calc-error");
    told.textContent = error;
    told.hidden = false;
    fieldOf(name).setAttribute("aria-invalid", "true");
    if (boxOf(name).closest("details")) boxOf(name).closest("details").open = true;
    at("old").hidden = at("result").hidden;
    at("result").classList.add("calc-outdated");
    at("elsewhere").hidden = true;
    at("short").textContent = "No answer: see the field with a mark.";
    say(error);
  }

  // ------------------------------------------------------------------------------------------------ what one sees

  const say = (text) => { at("said").textContent = text; };

  function bytes(size) {  // as peftlab.memory.format_bytes writes it
    const units = ["bytes", "kB", "MB", "GB", "TB", "PB"];
    let unit = 0, value = size;
    while (Math.abs(value) >= 1000 && unit < units.length - 1) { value /= 1000; unit += 1; }
    return unit ? `${value.toFixed(2)} ${units[unit]}` : `${value} bytes`;
  }

  const short = (size) => bytes(size).replace(".00", "");
  const whole = (number) => number.toLocaleString("en");
  const gibibytes = (size) => `${(size / 2 ** 30).toFixed(2)} GiB`;
  const PHASES = { forward: "the forward pass", loss: "the loss", backward: "the backward pass", optimiser: "the optimiser's step" };

  function element(tag, content, attributes = {}) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    for (const one of [content].flat()) if (one !== null && one !== undefined) made.append(one);
    return made;
  }

  function drawn(tag, attributes = {}, content = []) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...[content].flat());
    return made;
  }

  function momentInWords(moment) {
    const [phase, place] = moment.split(", ");
    return (PHASES[phase] || phase) + (place ? `, ${place}` : "");
  }

  function show(given, found) {
    last = { given, found };
    points = null;
    at("peak").textContent = bytes(found.peak_bytes);
    at("peak-binary").textContent = gibibytes(found.peak_bytes);
    at("needed").textContent = bytes(found.with_margin);
    const holding = found.cards.filter((card) => card.fits);
    const several = (given.gpus ?? 1) > 1 ? " on each GPU" : "";
    const verdict = holding.length
      ? `The smallest card that holds it is ${holding[0].name} (${short(holding[0].bytes)}).`
      : "None of the cards in the list holds it.";
    at("verdict").textContent = verdict;
    at("each").textContent = several ? "of each GPU" : "of the GPU";
    at("short").textContent = `${bytes(found.peak_bytes)}: ${holding.length ? `fits ${holding[0].name}` : "fits no card"}`;
    at("short").hidden = false;
    at("moment").textContent = `The peak is reached in ${momentInWords(found.moment)}.`;
    showParts(found);
    showMeasured(found);
    showCards(found);
    showStep();
    at("facts").textContent = `${whole(found.trainable)} of ${whole(found.total)} numbers train. A step needs `
      + `${(found.flops / 1e12).toPrecision(3)} TFLOP, and the saved file has ${bytes(found.file_bytes)}.`;
    at("curve").replaceChildren();
    at("curve-table").replaceChildren();
    at("curve-text").textContent = "The curve is being computed.";
    at("result").hidden = false;
    say(`Peak ${bytes(found.peak_bytes)}${several}, ${bytes(found.with_margin)} with the margin. ${verdict}`);
  }

  function showParts(found) {
    const bar = [], rows = [];
    for (const [kind, name] of Object.entries(data.kinds)) {
      const size = found.parts[kind], share = (100 * size) / found.peak_bytes;
      const colour = `--part: ${data.colours[kind]}`;
      if (size) bar.push(element("span", "", { style: `${colour}; flex-grow: ${size}` }));
      rows.push(element("tr", [
        element("th", [element("span", "", { class: "calc-swatch", style: colour }), name], { scope: "row" }),
        element("td", bytes(size)), element("td", `${share.toFixed(1)} %`),
      ], { "data-part": kind }));
    }
    at("parts-bar").replaceChildren(...bar);
    at("parts").replaceChildren(...rows);
  }

  const percent = (share) => `${Math.abs(100 * share).toFixed(2)} %`;
  const TINY = 5e-5;  // a share that is shown as nothing

  function errorsInWords({ lowest, highest, median }) {
    const low = lowest < -TINY ? `at most ${percent(lowest)} too low` : "never too low";
    const high = highest > TINY ? `at most ${percent(highest)} too high` : "never too high";
    const middle = Math.abs(median) > TINY ? `${percent(median)} too ${median < 0 ? "low" : "high"}` : "right";
    return `There the estimate was ${low}, and ${high}. In the middle one of these runs it was ${middle}.`;
  }

  function showMeasured({ measured, with_margin: needed }) {
    const { runs, alike, apart } = measured;
    at("measured").textContent = `${runs} runs on real GPUs are most like this one. ${errorsInWords(measured)}`;
    at("alike").textContent = `They have in common: ${alike.join(", ")}.`;
    at("apart").textContent = `Not measured, or in too few runs: ${apart.join(", ")}.`;
    at("apart").hidden = !apart.length;
    at("margin").textContent = `Keep ${bytes(needed)} free. That is the peak with ${(100 * data.margin.too_low).toFixed(0)} % more, `
      + `and ${short(data.margin.context)} for the CUDA context. This margin covers all ${data.margin.runs} runs that it is held to.`;
  }

  function showCards(found) {
    at("cards").replaceChildren(...found.cards.map((card) => {
      const left = card.bytes - found.with_margin;
      return element("li", [
        element("span", [element("strong", card.name), ` ${short(card.bytes)}`]),
        element("span", card.fits ? `${bytes(left)} to spare` : `${bytes(-left)} too small`),
      ], { class: card.fits ? "calc-fits" : "calc-small" });
    }));
  }

  let last = null, points = null;

  const PAD = { left: 66, right: 26, top: 14, bottom: 34 };

  function frame(name, height, label) {
    const width = Math.max(260, at(name).clientWidth);
    const picture = drawn("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
    at(name).replaceChildren(picture);
    return { picture, width, height, right: width - PAD.right, bottom: height - PAD.bottom };
  }

  const text = (x, y, content, more = {}) => drawn("text", { x, y, ...more }, content);

  // Memory through one step, with its peak
  function showStep() {
    if (!last) return;
    const { history: points, peak_bytes: peak } = last.found;
    const highest = {};
    for (const [moment, size] of points) {
      const phase = moment.split(",")[0];
      highest[phase] = Math.max(highest[phase] || 0, size);
    }
    const told = Object.entries(highest).map(([phase, size]) => `${PHASES[phase] || phase} ${bytes(size)}`);
    const { picture, right, bottom } = frame("step", 190, `Memory during one step. Highest in each phase: ${told.join(", ")}.`);
    const x = (i) => PAD.left + ((right - PAD.left) * i) / Math.max(1, points.length - 1);
    const y = (size) => bottom - ((bottom - PAD.top) * size) / (1.12 * peak);
    for (const share of [0, 0.5, 1]) {
      picture.append(drawn("line", { x1: PAD.left, x2: right, y1: y(share * peak), y2: y(share * peak), class: "calc-grid" }),
        text(PAD.left - 6, y(share * peak) + 4, share ? bytes(share * peak) : "0", { "text-anchor": "end" }));
    }
    const line = points.map(([, size], i) => `${x(i).toFixed(1)},${y(size).toFixed(1)}`).join(" ");
    picture.append(drawn("polygon", { points: `${PAD.left},${bottom} ${line} ${right},${bottom}`, class: "calc-area" }),
      drawn("polyline", { points: line, class: "calc-line" }));
    let start = 0;
    for (let i = 1; i <= points.length; i += 1) {
      const phase = points[start][0].split(",")[0];
      if (i < points.length && points[i][0].split(",")[0] === phase) continue;
      if (x(i) - x(start) > 8 * phase.length) {
        picture.append(text((x(start) + x(Math.min(i, points.length - 1))) / 2, bottom + 20, phase, { "text-anchor": "middle" }));
      }
      if (i < points.length) picture.append(drawn("line", { x1: x(i), x2: x(i), y1: PAD.top, y2: bottom + 6, class: "calc-border" }));
      start = i;
    }
    const top = points.findIndex(([, size]) => size === peak);
    picture.append(drawn("circle", { cx: x(top), cy: y(peak), r: 5, class: "calc-peak" }));
  }

  // The peak over the length of the examples
  function showCurve(found, chosen) {
    points = { found, chosen };
    drawCurve();
    at("curve-text").textContent = "";
    at("curve-table").replaceChildren(...found.map(({ sequence, peak, with_margin: needed, card }) => element("tr", [
      element("th", whole(sequence), { scope: "row" }), element("td", bytes(peak)), element("td", bytes(needed)),
      element("td", card ?? "none of the list"),
    ], { "data-sequence": sequence })));
  }

  function drawCurve() {
    if (!points || points.found.length < 2) return;
    const { found, chosen } = points;
    const first = found[0], end = found[found.length - 1];
    const { picture, right, bottom } = frame("curve", 260, "The peak with the margin over the length of an example: "
      + `${bytes(first.with_margin)} at ${whole(first.sequence)} tokens, ${bytes(end.with_margin)} at ${whole(end.sequence)} tokens. `
      + "The table below has all values.");
    const low = 0.8 * first.peak, high = 1.3 * end.with_margin;
    const scale = (value, from, to, a, b) => a + ((b - a) * Math.log(value / from)) / Math.log(to / from);
    const x = (sequence) => scale(sequence, first.sequence, end.sequence, PAD.left, right);
    const y = (size) => scale(size, low, high, bottom, PAD.top);
    let under = Infinity;
    for (const size of [...new Set(Object.values(data.cards))].sort((a, b) => a - b)) {
      if (size < low || size > high || under - y(size) < 16) continue;
      under = y(size);
      picture.append(drawn("line", { x1: PAD.left, x2: right, y1: under, y2: under, class: "calc-card" }),
        text(PAD.left - 6, under + 4, short(size), { "text-anchor": "end" }));
    }
    let before = -Infinity;
    for (const { sequence } of found) {
      if (x(sequence) - before < 52) continue;
      before = x(sequence);
      picture.append(text(before, bottom + 20, whole(sequence), { "text-anchor": "middle" }));
    }
    for (const [kind, name] of [["with_margin", "calc-line"], ["peak", "calc-line calc-thin"]]) {
      picture.append(drawn("polyline", { points: found.map((one) => `${x(one.sequence)},${y(one[kind])}`).join(" "), class: name }));
    }
    for (const one of found) {
      picture.append(drawn("circle", {
        cx: x(one.sequence), cy: y(one.with_margin), r: one.sequence === chosen ? 6 : 3, class: one.sequence === chosen ? "calc-peak" : "calc-dot",
      }));
    }
  }

  // -------------------------------------------------------------------------------------------------- the page

  async function copy(event) {
    const button = event.currentTarget;
    const source = document.getElementById(button.dataset.copies);
    try {
      await navigator.clipboard.writeText(source.textContent);
      say("Copied.");
      button.textContent = "Copied";
    } catch {  // not allowed: select it, so that the reader can copy it
      getSelection().selectAllChildren(source);
      say("Selected: copy it with the keyboard.");
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }

  async function readFile(event) {
    const [file] = event.currentTarget.files;
    if (!file) return;
    fieldOf("config").value = await file.text();
    changed();
  }

  function prepare() {
    form.hidden = false;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", (event) => { if (event.target.type !== "file") changed(); });
    at("file").addEventListener("change", readFile);
    at("load").addEventListener("click", load);
    for (const button of root.querySelectorAll("[data-copies]")) button.addEventListener("click", copy);
    addEventListener("hashchange", () => { if (restore(location.hash)) changed(); });
    new ResizeObserver(() => { showStep(); drawCurve(); }).observe(at("result"));
    restore(location.hash);
    arrange();
    showElsewhere();
    const reason = impossible();
    if (reason) refuse(reason);
    else at("start").hidden = false;
  }

  prepare();
  window.peftlabCalculator = { ask, command, call, fragment, question, restore, answer };
})();
