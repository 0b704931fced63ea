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
  const LONGEST = 500000;  // characters of a pasted text
  const LINK = 8000;  // characters of a link: programs that carry longer ones cut them

  // ------------------------------------------------------------------------------------------------ the question

  const boxes = [...form.querySelectorAll("[data-field]")];
  const fieldOf = (name) => fields.find((input) => input.name === name);
  const boxOf = (name) => boxes.find((box) => box.dataset.field === name);

  function valueOf(input) {
    if (input.dataset.kind === "number") return input.value === "" ? null : Number(input.value);
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

  const labelOf = (input) => input.labels[0].textContent;

  // What is wrong with a field that is shown, which needs no Python to be seen
  function faultOf(input) {
    if (boxOf(input.name).hidden) return null;
    if (input.name === "config") {
      if (!input.value.trim()) return "Paste the text of the model's config.json here.";
      return input.value.length > LONGEST ? tooLong(input.value.length) : null;
    }
    if (input.validity.valid) return null;
    return `${labelOf(input)} must be a whole number from ${whole(Number(input.min))} to ${whole(Number(input.max))}.`;
  }

  const tooLong = (length) => `This text has ${whole(length)} characters, and a config.json at most ${whole(LONGEST)}.`;

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

  // Puts the settings of a link into the form. Every other setting is as by default, and so is one that is not known.
  function restore(text) {
    if (!text.includes("=")) return false;  // no settings, but perhaps a place in the page
    const unknown = [];
    for (const input of fields) input.value = usual(input.name);
    for (const [name, value] of new URLSearchParams(text.replace(/^#/, ""))) {
      if (name === "targets" && value !== "all-linear") {
        fieldOf("targets").value = NAMED;
        fieldOf("names").value = value;
      } else if (!put(fieldOf(name), value)) {
        unknown.push(`${name}=${value}`.slice(0, 80));
      }
      if (name === "config") fieldOf("shape").value = PASTED;
    }
    const settings = unknown.length > 1 ? "settings" : "a setting";
    at("unknown").textContent = `This link has ${settings} that the page does not know: ${unknown.join(", ")}.`;
    at("unknown").hidden = !unknown.length;
    arrange();
    return true;
  }

  // Puts a value into a field and says whether it can hold it. A list holds what it offers, and a number field numbers.
  function put(input, value) {
    if (!input) return false;
    input.value = value;
    const listed = input.tagName === "SELECT" || input.dataset.kind === "number";
    if (listed && (input.value !== value || input.selectedIndex === -1)) {
      input.value = usual(input.name);
      return false;
    }
    if (input.closest("details")) input.closest("details").open = true;
    return true;
  }

  function usual(name) {
    const value = data.defaults[name];
    if (name === "shape") return [...fieldOf(name).options].find((option) => option.defaultSelected).value;
    return value === null || value === undefined ? "" : value === true ? "yes" : value === false ? "no" : String(value);
  }

  // ------------------------------------------------------------------------------------------- asking the worker

  let worker = null, started = false, ready = false, serial = 0, asked = null;
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
    if (message.failed) return stop(message.failed);
    waiting.get(message.id).resolve(message);
    waiting.delete(message.id);
  }

  // Ends a worker whose Python failed, for it may be damaged. The next question gets a new one.
  function stop(reason) {
    worker.terminate();
    worker.onmessage = worker = null;
    ready = false;
    for (const { reject } of waiting.values()) reject(new Error(reason));
    waiting.clear();
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
    const elsewhere = at("elsewhere").hidden ? "" : " The command below asks the same question in a shell.";
    at("refused").textContent = reason + elsewhere;
    at("refused").hidden = false;
    at("result").hidden = at("short").hidden = true;
    say(at("refused").textContent);
  }

  // Python could not be started. The reader may try again.
  function broken(reason) {
    if (worker) stop(reason);
    started = false;
    at("progress").hidden = true;
    at("load").disabled = false;
    refuse(`The calculator could not start here (${reason}).`);
  }

  function load() {
    started = true;
    at("refused").hidden = true;
    at("start").hidden = false;
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
      (ready ? stop : broken)(event.message || "its files were not loaded");
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
    if (!flagged()) await answer();
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
    const slow = setTimeout(() => {
      if (asked === given) at("short").textContent = at("busy").textContent = "Computing.";
    }, SLOW);
    try {
      message = await ask("answer", given);
    } catch (error) {
      message = { answer: {
        error: `Python stopped at this question (${error.message}). It starts again when you change a setting.`,
        field: typeof given.shape === "string" ? "method" : "shape",
      } };
    } finally {
      clearTimeout(slow);
    }
    if (asked !== given) return undefined;  // the settings have changed meanwhile
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
      let one;
      try {
        ({ answer: one } = await ask("point", { ...given, sequence }));
      } catch (error) {
        at("curve-text").textContent = `The curve could not be computed (${error.message}).`;
        return;
      }
      if (one) points.push({ sequence, ...one });
    }
    if (mine === curve && asked === given) showCurve(points, given.sequence ?? data.defaults.sequence);
  }

  let timer = 0;

  // A setting was changed. What follows from it waits until no key has been struck for a while.
  function changed() {
    arrange();
    asked = null;
    clearTimeout(timer);
    timer = setTimeout(settled, WAIT);
  }

  function settled() {
    if (flagged()) return;
    if (!started) clearErrors();
    showElsewhere();
    history.replaceState(null, "", at("link").parentElement.hidden ? location.pathname + location.search : fragment(question()));
    if (ready) answer();
    else if (started && !worker) load();
  }

  // Marks the first field with a fault that the page sees itself, and says whether there is one
  function flagged() {
    const input = fields.find(faultOf);
    if (!input) return false;
    clearErrors();
    showError({ error: faultOf(input), field: input.name });
    return true;
  }

  function showElsewhere() {
    const given = question(), link = location.href.split("#")[0] + fragment(given);
    at("command").textContent = command(given);
    at("call").textContent = call(given);
    at("link").textContent = link;
    at("link").parentElement.hidden = link.length > LINK;
    at("no-link").hidden = link.length <= LINK;
    at("save").hidden = typeof given.shape === "string";
    at("elsewhere").hidden = false;
  }

  function clearErrors() {
    for (const box of form.querySelectorAll(".calc-error")) box.hidden = true;
    for (const input of fields) input.removeAttribute("aria-invalid");
    at("result").removeAttribute("aria-busy");
    at("busy").textContent = "";
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
    at("part").hidden = !found.shape.endsWith("(its text part)");
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
      const hatched = kind === "logits" ? " calc-hatched" : "";  // its colour is that of what lives for a moment
      if (size) bar.push(element("span", "", { class: hatched, style: `${colour}; flex-grow: ${size}` }));
      rows.push(element("tr", [
        element("th", [element("span", "", { class: `calc-swatch${hatched}`, style: colour }), name], { scope: "row" }),
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

  // "name=value" with the name that the form has for it
  const labelled = (told) => told.replace(/^(\w+)=/, (all, name) => (fieldOf(name) ? `${labelOf(fieldOf(name))}: ` : all));

  function showMeasured({ measured, with_margin: needed }) {
    const { runs, alike, apart, beyond } = measured;
    at("beyond").textContent = `No measured run comes near these settings: ${beyond.map(labelled).join("; ")}. `
      + "So the error may be larger than what follows says.";
    at("beyond").hidden = !beyond.length;
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
    if (file.size > LONGEST) return showError({ error: tooLong(file.size), field: "config" });
    fieldOf("config").value = await file.text();
    changed();
  }

  function prepare() {
    form.hidden = false;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", (event) => {
      at("unknown").hidden = true;
      if (event.target.type !== "file") changed();
    });
    at("file").addEventListener("change", readFile);
    at("load").addEventListener("click", load);
    for (const button of root.querySelectorAll("[data-copies]")) button.addEventListener("click", copy);
    addEventListener("hashchange", () => { if (restore(location.hash)) changed(); });
    new ResizeObserver(() => { showStep(); drawCurve(); }).observe(at("result"));
    restore(location.hash);
    arrange();
    if (!flagged()) showElsewhere();
    const reason = impossible();
    if (reason) refuse(reason);
    else at("start").hidden = false;
  }

  prepare();
  window.peftlabCalculator = { ask, command, call, fragment, question, restore, answer };
})();
