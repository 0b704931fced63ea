// The decision guide: applies the rules of peftlab/guide/rules.toml to the reader's answers, as pl.recommend does.
// The page holds the rules, their evidence and the estimated memory as JSON (_ext/peftlab_book/guide.py), so that it
// works without a kernel and without a network. tests/book/test_guide_page.py compares its answers with pl.recommend's.
"use strict";

(function () {
  const holder = document.getElementById("guide-data");
  if (!holder) return;
  const data = JSON.parse(holder.textContent);

  // ------------------------------------------------------------------------------------------------ the decision

  function meets(value, wanted) {
    if (value === undefined || value === null) return false;
    if (Array.isArray(wanted)) return wanted.includes(value);
    if (typeof wanted === "object") {
      return (wanted.least === undefined || value >= wanted.least) && (wanted.most === undefined || value <= wanted.most);
    }
    return value === wanted;
  }

  const applies = (rule, facts) => Object.entries(rule.if || {}).every(([name, wanted]) => meets(facts[name], wanted));

  function candidates(facts) {
    const found = new Map();
    for (const rule of data.rules) {
      if (rule.method && applies(rule, facts) && !found.has(rule.method)) found.set(rule.method, rule);
    }
    return found;
  }

  function choices(facts) {
    const chosen = {}, reasons = [], asides = [];
    for (const rule of data.rules) {
      if (rule.method || !applies(rule, { ...facts, ...chosen })) continue;
      const fresh = Object.keys(rule.choose || {}).filter((name) => !(name in chosen));
      for (const name of fresh) chosen[name] = rule.choose[name];
      if (fresh.length) reasons.push([fresh, rule]);
      else if (!rule.choose) asides.push(rule);
    }
    return { chosen, reasons, asides };
  }

  const variant = (method, chosen) => [method, chosen.r, chosen.targets].filter((one) => one !== undefined).join("/");
  const withMargin = (peak) => Math.trunc((1 + data.too_low) * peak) + data.context;
  const targetsOf = (chosen) => (chosen.targets === "query-value" ? undefined : chosen.targets);
  const plain = (number) => number.toFixed(10).replace(/\.?0+$/, "");

  // The card: a name of the list, or its memory in GB
  function readCard(card) {
    if (typeof card !== "number") return { name: card, gb: data.cards[card].gb, room: data.cards[card].room };
    const bytes = Math.trunc(card * data.gb);
    return { name: "", gb: card, room: Math.max(0, Math.round((bytes - data.context) / (1 + data.too_low))) };
  }

  function cardsThatHold(peak) {
    const sorted = Object.entries(data.cards).sort(([, a], [, b]) => a.gb - b.gb);
    return sorted.filter(([, card]) => peak <= card.room).map(([name]) => name);
  }

  function attempt(facts, rule, known, room) {
    const { chosen, reasons, asides } = choices(facts);
    let smallest = null;
    for (const [batch, again] of chosen.ladder) {
      const peak = known[`${batch}${again ? "c" : ""}`];
      const one = { method: facts.method, rule, chosen, reasons, asides, batch, again, peak, fits: peak <= room };
      if (one.fits) return one;
      if (!smallest || peak < smallest.peak) smallest = one;
    }
    return smallest;
  }

  function command(answer, chosen) {
    const model = data.fetched.includes(answer.model) ? answer.model : `path/to/${answer.model}`;
    const words = ["peftlab train --model", model, "--data my.jsonl --out run1 --method", answer.method];
    if (chosen.r !== undefined) words.push("--r", plain(chosen.r), "--alpha", plain(chosen.alpha));
    if (targetsOf(chosen)) words.push("--targets", targetsOf(chosen));
    words.push("--lr", plain(chosen.learning_rate), "--batch-size", answer.batch);
    if (answer.accumulation > 1) words.push("--accumulation", answer.accumulation);
    if (answer.checkpointing) words.push("--checkpointing");
    return [...words, "--epochs", plain(chosen.epochs), "--max-length", answer.sequence].join(" ");
  }

  // The answer as Recommendation.to_dict() gives it, or {error: why there is none}
  function recommend({ task, model, card, examples, sequence, serving, four_bit }) {
    const shape = data.shapes[model];
    if (shape.too_long[sequence]) return { error: shape.too_long[sequence] };
    if (shape.refused[task]) return { error: shape.refused[task] };
    const peaks = data.peaks[model][sequence];
    const held = readCard(card);
    const facts = {
      task, serving, kind: shape.kind, size: shape.size, examples: examples === null ? Infinity : examples, four_bit,
      card: held.name, gpus: 1,
    };
    const tried = [], refused = {};
    for (const [method, rule] of candidates(facts)) {
      const known = peaks[variant(method, choices({ ...facts, method }).chosen)];
      if (typeof known === "string") {  // this model cannot have the method, or examples of this length
        refused[method] = known;
        continue;
      }
      tried.push(attempt({ ...facts, method }, rule, known, held.room));
      if (tried[tried.length - 1].fits) break;
    }
    if (!tried.length) return { error: Object.values(refused)[0] };
    let best = tried[tried.length - 1];
    if (!best.fits) best = tried.reduce((a, b) => (b.peak < a.peak ? b : a));
    const { chosen } = best;
    const accumulation = Math.max(1, Math.floor(chosen.update / best.batch));
    const steps = examples === null ? null : Math.max(1, Math.ceil((chosen.epochs * examples) / (best.batch * accumulation)));
    const time = chosen.targets !== "all-linear" ? undefined : data.timed.find((one) =>
      one.card === held.name && one.shape === model && one.method === best.method && one.r === chosen.r &&
      one.batch === best.batch && one.sequence === sequence && one.checkpointing === best.again);
    const decided = [[["method"], best.rule], ...best.reasons];
    const applied = [...decided.map(([, rule]) => rule), ...best.asides];
    const answer = {
      task, serving, model, kind: shape.kind, parameters: shape.size, card: held.name, card_gb: held.gb, gpus: 1,
      sequence, examples, four_bit, method: best.method,
      measured_on: [...new Set(best.rule.evidence.filter((one) => one.scores).map((one) => one.at))], r: chosen.r ?? null, alpha: chosen.alpha ?? null,
      targets: chosen.targets ?? null, dropout: chosen.dropout ?? null, learning_rate: chosen.learning_rate,
      rates: chosen.rates, precision: chosen.precision, batch: best.batch, accumulation, checkpointing: best.again,
      parallel: null, epochs: chosen.epochs, steps, ship: chosen.ship, fits: best.fits, peak_bytes: best.peak,
      with_margin_bytes: withMargin(best.peak), cards: cardsThatHold(best.peak),
      too_large: Object.fromEntries(tried.filter((one) => one !== best).map((one) => [one.method, one.peak])),
      refused,
      step_seconds: time ? time.seconds * accumulation : null,
      seconds: time && steps !== null ? time.seconds * accumulation * steps : null,
      time_source: time ? time.source : null,
      more: applied.filter((rule) => rule.more).map((rule) => rule.more),
      traps: applied.filter((rule) => rule.trap).map((rule) => rule.trap),
      no_command: data.no_command[task] ?? null,
    };
    answer.command = answer.no_command ? null : command(answer, chosen);
    answer.reasons = decided.map(([settings, rule]) => ({ settings, because: rule.because, evidence: rule.evidence }));
    return answer;
  }

  // ------------------------------------------------------------------------------------------------ what one sees

  const size = (bytes) => (bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB` : `${(bytes / 1e6).toFixed(0)} MB`);
  const spoken = (name) => data.spoken[name] || name.replace(/_/g, " ");

  function duration(seconds) {
    for (const [unit, word] of [[3600, "h"], [60, "min"]]) {
      if (seconds >= 2 * unit) return `${(seconds / unit).toFixed(1)} ${word}`;
    }
    return `${seconds.toFixed(0)} s`;
  }

  function element(tag, content, attributes = {}) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    for (const one of [content].flat()) if (one !== null && one !== undefined) made.append(one);
    return made;
  }

  function rowsOf(answer) {
    const [low, high] = answer.rates.map(plain);
    const memory = `${size(answer.peak_bytes)}, ${size(answer.with_margin_bytes)} with the margin`;
    const time = answer.step_seconds === null ? "not measured"
      : `${answer.step_seconds.toPrecision(3)} s for an update`
        + (answer.seconds === null ? "" : `, ${duration(answer.seconds)} in all`) + `; measured: ${answer.time_source}`;
    const accumulated = answer.accumulation > 1 ? `, ${answer.accumulation} batches in an update` : "";
    return [
      ["Method", answer.method],
      ["Measured on", answer.measured_on.join("; ") || data.unscored],
      ...(answer.r === null ? [] : [["Rank", `${answer.r}, alpha ${plain(answer.alpha)}`]]),
      ...(answer.targets === null ? [] : [["Targets", data.targets[answer.targets]]]),
      ["Learning rate", `${plain(answer.learning_rate)}; try ${low} to ${high}`],
      ["Precision", data.precisions[answer.precision]],
      ["Step", `${answer.batch} × ${answer.sequence} tokens, activations `
        + (answer.checkpointing ? "computed again" : "kept") + accumulated],
      ["Epochs", plain(answer.epochs) + (answer.steps === null ? "" : `, ${answer.steps} updates`)],
      ["Expected peak", answer.fits ? memory : `${memory}; it does not fit this card`],
      ["Cards that hold it", answer.cards.join(", ") || "none of the list"],
      ...Object.entries(answer.too_large).map(([method, peak]) => ["Too large", `${method}: ${size(withMargin(peak))}`]),
      ...Object.entries(answer.refused).map(([method, reason]) => ["Not possible", `${method}: ${reason}`]),
      ["Expected time", time],
      ["Afterwards", answer.ship],
      ["Command", answer.command === null ? answer.no_command : element("code", answer.command)],
    ];
  }

  function listed(title, texts) {
    return texts.length ? [element("p", element("strong", title)), element("ul", texts.map((text) => element("li", text)))] : [];
  }

  function shown(answer) {
    if (answer.error) return [element("p", answer.error)];
    const rows = rowsOf(answer).map(([label, value]) => element("tr", [element("th", label, { scope: "row" }), element("td", value)]));
    const reasons = answer.reasons.map((reason) => element("li", [
      `${reason.settings.map(spoken).join(", ")}: ${reason.because}`,
      element("ul", reason.evidence.map((one) => element("li", [
        `${one.text} (${one.source}). `, element("a", one.words, { href: one.address }),
      ]))),
    ]));
    return [
      element("table", element("tbody", rows), { class: "guide-answer" }),
      ...listed("If it is not enough", answer.more),
      ...listed("Look out", answer.traps),
      element("details", [element("summary", "Why, and by which measurements"), element("ul", reasons)]),
    ];
  }

  // What the form says, or null where a number is missing
  function given(form) {
    const value = (name) => form.elements[name].value;
    const other = value("card") === "other";
    const gigabytes = Number(value("gigabytes"));
    if (other && !(gigabytes >= 1 && gigabytes <= 10000)) return null;
    const examples = value("examples") === "" ? null : Math.trunc(Number(value("examples")));
    if (examples !== null && !(examples >= 1)) return null;
    return {
      task: value("task"), model: value("model"), card: other ? gigabytes : value("card"), examples,
      sequence: Number(value("sequence")), serving: value("serving"), four_bit: form.elements.four_bit.checked,
    };
  }

  function answerForm(form, result) {
    form.elements.gigabytes.closest("label").hidden = form.elements.card.value !== "other";
    const inputs = given(form);
    result.replaceChildren(...(inputs ? shown(recommend(inputs)) : [element("p", "Give a number of at least one.")]));
  }

  function begin() {
    const form = document.getElementById("guide-form"), result = document.getElementById("guide-result");
    form.hidden = false;
    result.hidden = false;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", () => answerForm(form, result));
    answerForm(form, result);
  }

  window.peftlabGuide = { recommend };
  begin();
})();
