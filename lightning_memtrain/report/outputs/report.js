"use strict";
(() => {
  const report = JSON.parse(document.getElementById("report-data").textContent);
  const page = document.getElementById("page");

  // From the bottom of the stack to its top: what stays, then what comes and goes.
  const STACK = ["parameters", "buffers", "held", "optimizer_state", "gradients", "buckets", "inputs", "gathered_weights", "unsharded_gradients", "activations", "temporary", "workspace"];
  // In the tables, the order of the terminal's table.
  const ROWS = ["parameters", "gradients", "optimizer_state", "activations", "buffers", "inputs", "temporary", "gathered_weights", "unsharded_gradients", "buckets", "held", "workspace"];
  const UNUSUAL = ["gathered_weights", "unsharded_gradients", "buckets", "held"];  // no row where they hold nothing
  const GROUPS = { model: ["parameters", "buffers", "gathered_weights", "held"], optimizer: ["gradients", "optimizer_state", "unsharded_gradients", "buckets"], activations: ["activations", "inputs", "temporary", "workspace"] };
  const WORDS = {
    parameters: "The model's weights.",
    gradients: "Gradients of the weights.",
    "optimizer state": "What the optimizer keeps per weight, such as momentum.",
    activations: "Results that the forward pass saved for the backward pass.",
    recomputed: "The part of the activations that activation checkpointing computed a second time.",
    buffers: "Tensors of the model that are not trained, such as batch norm statistics.",
    inputs: "The batch.",
    temporary: "All other tensors: intermediate results, gradients of activations.",
    "gathered weights": "Whole weights of a layer, gathered from all processes for as long as it runs (FSDP2).",
    "unsharded gradients": "Gradients of whole weights, before they are reduced to each process's share (FSDP2).",
    buckets: "What gradients are averaged in over processes (DDP); they may lie there, too.",
    held: "What callbacks, attributes and second models hold on the device beside all of these, used in this step or not.",
    workspace: "Allocator minus ledger: scratch memory inside operators and rounding.",
    ledger: "The exact sum of all live tensor storages.",
    allocator: "The peak that the device's own allocator counted.",
    reserved: "What the allocator had taken from the device at most, its free blocks among it.",
    "allocation retries": "How often the allocator found no free block and had to give its free blocks back first, which waits for the device.",
    produced: "Activations and temporaries live at the peak that the module made.",
    saved: "Activations live at the peak that the module was the first to save for its backward pass.",
  };
  const STAGE_STEP = { fit: "one training step", validate: "one validation step", test: "one test step", predict: "one prediction step" };

  const label = (category) => category.replaceAll("_", " ");
  const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
  const count = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;

  // Ties go to even, as Python rounds, so that page and terminal show the same digits. A tie is exact only
  // at an odd eighth (two decimals) or an odd quarter (one).
  function rounded(value, decimals) {
    const parts = value * 2 ** (decimals + 1);
    if (Number.isInteger(parts) && parts % 2) {
      const low = Math.floor(value * 10 ** decimals);
      return ((low % 2 ? low + 1 : low) / 10 ** decimals).toFixed(decimals);
    }
    return value.toFixed(decimals);
  }
  function bytes(number) {
    for (const [factor, unit] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
      if (Math.abs(number) >= factor) return `${rounded(number / factor, 2)} ${unit}`;
    }
    return `${number} B`;
  }
  // Lets a long path break after its dots.
  const breakable = (path) => path.split(/(?<=\.)/).flatMap((part) => [part, el("wbr")]);
  const share = (part, whole) => (whole ? `${rounded((part / whole) * 100, 1)}%` : "");

  // Text only ever enters the page as text nodes and attribute values, never as markup.
  function make(namespace, tag, attributes, children) {
    const node = namespace ? document.createElementNS(namespace, tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
    }
    node.append(...children.flat(2).filter((child) => child !== null && child !== undefined));
    return node;
  }
  const el = (tag, attributes, ...children) => make(null, tag, attributes, children);
  const svg = (tag, attributes, ...children) => make("http://www.w3.org/2000/svg", tag, attributes, children);
  const color = (category) => `background:var(--${category})`;
  const swatch = (category) => el("span", { class: "swatch", style: color(category), "aria-hidden": "true" });
  const card = (id, title, note, ...children) =>
    el("section", { class: "card", id, "aria-labelledby": `${id}-title` },
      el("h2", { id: `${id}-title` }, title), note ? el("p", { class: "note" }, note) : null, ...children);

  function stackBar(held, whole, description) {
    const parts = STACK.filter((category) => held[category] > 0);
    return el("div", { class: "stack", role: "img", "aria-label": description },
      parts.map((category) => el("i", { style: `${color(category)};width:${(100 * held[category]) / whole}%`, title: `${label(category)} ${bytes(held[category])}` })));
  }

  function seconds(number) {
    if (number < 1) return `${+(1000 * number).toPrecision(3)} ms`;
    if (number < 60) return `${number.toFixed(1)} s`;
    if (number < 3600) return `${Math.floor(number / 60)} min ${Math.floor(number % 60)} s`;
    return `${Math.floor(number / 3600)} h ${Math.floor((number % 3600) / 60)} min`;
  }
  function times(name) {
    const known = (report.step_times || {})[name];
    if (!known) return [];
    if (known.median_seconds === null) return [["Step time", `${seconds(known.measured_median_seconds)}\nall steps were measured`]];
    const added = known.measured_seconds - known.num_measured * known.median_seconds;
    const more = `${known.num_measured === 1 ? "the measured step" : `${known.num_measured.toLocaleString("en")} measured steps`}: ${seconds(Math.abs(added))} ${added >= 0 ? "more" : "less"} in all`;
    return [["Step time", `${seconds(known.median_seconds)}\nmedian of ${known.num_steps.toLocaleString("en")}${known.num_measured ? `; ${more}` : ""}`]];
  }

  // ---- headline -----------------------------------------------------------------------------------------
  function headline(stage, name) {
    const held = stage.at_peak;
    const peak = sum(Object.values(held));
    const known = stage.allocator_peak_bytes !== null;
    const ledger = peak - held.workspace;
    const grown = (report.growth[name] || []).reduce((total, row) => total + row.num_bytes, 0);
    const tiles = [
      ["Reached after", stage.peak_event || "not recorded"],
      ["Ledger", bytes(ledger)],
      known ? ["Workspace", bytes(held.workspace)] : null,
      stage.reserved_bytes !== null ? ["Reserved by the allocator", bytes(stage.reserved_bytes)] : null,
      stage.num_alloc_retries ? ["Allocation retries in this step", stage.num_alloc_retries.toLocaleString("en")] : null,
      stage.recomputed_max_bytes ? ["Recomputed at the peak", bytes(stage.recomputed_at_peak_bytes)] : null,
      stage.aside_peak_bytes ? ["Probes, left out", bytes(stage.aside_peak_bytes)] : null,
      ["Growth over the run", grown ? bytes(grown) : "none"],
      report.ranks ? [`Over ${count(report.ranks.world_size, "rank")}`, `${bytes(report.ranks.min_peak_bytes)} to ${bytes(report.ranks.max_peak_bytes)}`] : null,
      ...times(name),
      report.techniques.length ? ["Techniques", report.techniques.map((technique) => technique.name).join("\n")] : null,
    ];
    const groups = Object.entries(GROUPS).map(([group, members]) => [group, sum(members.map((member) => held[member]))]);
    return el("section", { class: "card", id: "headline", "aria-label": "Peak memory" },
      el("div", { class: "headline" },
        el("strong", { id: "peak" }, bytes(peak)),
        el("span", { class: "muted" }, `peak of ${STAGE_STEP[name] || name} on ${stage.device}, by the ${known ? "allocator" : "ledger"}`)),
      stackBar(held, Math.max(1, sum(STACK.map((category) => Math.max(0, held[category])))), "Shares of the peak by category; the table below has the numbers"),
      el("div", { class: "groups" }, groups.map(([group, size]) =>
        el("div", { id: `group-${group}` },
          el("span", { class: "small muted" }, GROUPS[group].filter((member) => held[member] > 0).map(swatch), ` ${group}`),
          el("b", {}, bytes(size)), el("span", { class: "small muted" }, share(size, peak))))),
      el("dl", { class: "tiles" }, tiles.filter(Boolean).map(([term, value]) => el("div", {}, el("dt", {}, term), el("dd", {}, value)))));
  }

  // ---- charts -------------------------------------------------------------------------------------------
  const MARGIN = { left: 62, right: 8, top: 22 };

  function ticks(top) {
    const [factor, unit] = [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"], [1, "B"]].find(([size]) => top >= size) || [1, "B"];
    const rough = top / factor / 4;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((multiple) => multiple * power).find((size) => size >= rough);
    const values = [];
    for (let tick = 0; tick * step * factor <= top; tick++) values.push([tick * step * factor, `${+(tick * step).toPrecision(6)} ${unit}`]);
    return values;
  }

  // A chart that draws itself for its width, and a cursor over its `length` points for mouse, touch and keys.
  function chart({ id, name, height, length, draw, describe }) {
    const tip = el("div", { class: "tip", hidden: "" });
    const box = el("div", { class: "chart", id, role: "slider", tabindex: "0", "aria-label": name, "aria-valuemin": 1, "aria-valuemax": length });
    let at = null;
    let plot = null;
    function point(index) {
      at = Math.max(0, Math.min(length - 1, index));
      const { text, rows, title } = describe(at);
      const x = plot.x(at);
      plot.cursor.setAttribute("d", `M${x} ${MARGIN.top}V${plot.bottom}`);
      box.setAttribute("aria-valuenow", at + 1);
      box.setAttribute("aria-valuetext", text);
      tip.replaceChildren(el("b", {}, title), ...rows);
      tip.hidden = false;
      const right = x > plot.width / 2;
      tip.style.left = right ? "auto" : `${x + 12}px`;
      tip.style.right = right ? `${plot.width - x + 12}px` : "auto";
    }
    function hide() { at = null; tip.hidden = true; if (plot) plot.cursor.setAttribute("d", ""); }
    function redraw() {
      const width = Math.max(240, Math.round(box.clientWidth));
      plot = draw(width, height);
      plot.cursor = svg("path", { class: "cursor" });
      plot.width = width;
      box.replaceChildren(svg("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" }, plot.nodes, plot.cursor), tip);
      if (at !== null) point(at);
    }
    const move = (event) => point(plot.index(event.clientX - box.getBoundingClientRect().left));
    box.addEventListener("pointermove", move);
    box.addEventListener("pointerdown", move);
    box.addEventListener("pointerleave", hide);
    box.addEventListener("blur", hide);
    box.addEventListener("focus", () => { if (at === null) { box.setAttribute("aria-valuenow", 1); box.setAttribute("aria-valuetext", describe(0).text); } });
    box.addEventListener("keydown", (event) => {
      const now = at === null ? 0 : at;
      const to = { ArrowLeft: now - 1, ArrowDown: now - 1, ArrowRight: at === null ? 0 : now + 1, ArrowUp: at === null ? 0 : now + 1, PageDown: now - 20, PageUp: now + 20, Home: 0, End: length - 1 }[event.key];
      if (event.key === "Escape") hide();
      if (to === undefined) return;
      event.preventDefault();
      point(to);
    });
    let drawn = 0;
    const fit = () => {
      const width = Math.round(box.clientWidth);
      if (width !== drawn) { drawn = width; redraw(); }
    };
    queueMicrotask(fit); // as soon as the box is in the page
    // In the next frame: drawing changes the size that is being observed.
    new ResizeObserver(() => requestAnimationFrame(fit)).observe(box);
    return { box, redraw };
  }

  function frame(width, height, top, foot) {
    const bottom = height - foot;
    const y = (size) => bottom - (size / top) * (bottom - MARGIN.top);
    const nodes = ticks(top).map(([size, text]) => [
      svg("path", { class: size ? "grid" : "axis", d: `M${MARGIN.left} ${y(size)}H${width - MARGIN.right}` }),
      svg("text", { x: MARGIN.left - 8, y: y(size) + 4, "text-anchor": "end" }, text)]);
    return { bottom, y, nodes, left: MARGIN.left, right: width - MARGIN.right };
  }

  function samples(stage) {
    const { names, name, held } = stage.timeline;
    const categories = STACK.filter((category) => category !== "workspace");
    return name.map((number, index) => {
      const sizes = Object.fromEntries(categories.map((category) => [category, held[category][index]]));
      return { name: names[number], held: sizes, total: sum(Object.values(sizes)) };
    });
  }

  // What the ledger itself says; every other event is a mark that a technique or a user has set.
  const LEDGER_WORDS = new Set(["step", "forward", "backward", "optimizer", "next", "peak", "peak,"]);
  const firstWord = (name) => name.split(" ")[0];

  // A mark lasts until the next one, the optimizer's step or the next step.
  function spansOfMarks(all) {
    const spans = [];
    let open = null;
    all.forEach((sample, index) => {
      const isMark = !LEDGER_WORDS.has(firstWord(sample.name));
      if (open && (isMark || sample.name === "optimizer step" || sample.name === "next step")) {
        open.to = index;
        open = null;
      }
      if (isMark) spans.push(open = { name: sample.name, from: index, to: all.length });
    });
    return spans;
  }

  function timeline(stage) {
    const note = "Live bytes after every event of the step, stacked by category. Point at the chart, or focus it and use the arrow keys.";
    if (!stage.timeline.name.length) return card("timeline", "Timeline of one step", null, el("p", { class: "muted" }, "No timeline was recorded."));
    const all = samples(stage);
    const categories = STACK.filter((category) => all.some((sample) => sample.held[category] > 0));
    const hidden = new Set();
    const shown = () => categories.filter((category) => !hidden.has(category));
    const spans = spansOfMarks(all);
    const height = spans.length ? 362 : 340;
    // The ledger says where the peak of the step is: probes within it, which may hold more, do not count.
    const isPeak = (sample) => sample.name === "peak" || sample.name.startsWith("peak, in ");
    // More samples than columns: keep the highest of each stretch, so that no peak is lost.
    const stretch = Math.ceil(all.length / 900);
    const points = [];
    for (let from = 0; from < all.length; from += stretch) {
      const to = Math.min(all.length, from + stretch);
      let best = from;
      for (let index = from; index < to; index++) {
        if (isPeak(all[index]) || (!isPeak(all[best]) && all[index].total > all[best].total)) best = index;
      }
      points.push({ ...all[best], at: best, from, to });
    }
    const highestPoint = points.reduce((best, sample, index) => (sample.total > points[best].total ? index : best), 0);
    const peak = points.some(isPeak) ? points.findIndex(isPeak) : highestPoint;
    const visibleTotal = (sample) => sum(shown().map((category) => sample.held[category]));

    function draw(width) {
      const whole = hidden.size === 0;
      const highest = Math.max(1, ...points.map(visibleTotal));
      const top = (whole && stage.allocator_peak_bytes !== null ? Math.max(highest, stage.allocator_peak_bytes) : highest) * 1.04;
      const f = frame(width, height, top, spans.length ? 66 : 44);
      const column = (f.right - f.left) / points.length;
      const x = (index) => f.left + index * column;
      const nodes = [...f.nodes];
      const base = points.map(() => 0);
      for (const category of shown()) {
        const upper = points.map((sample, index) => base[index] + sample.held[category]);
        let path = `M${f.left} ${f.y(upper[0]).toFixed(1)}`;
        upper.forEach((size, index) => { path += `V${f.y(size).toFixed(1)}H${x(index + 1).toFixed(1)}`; });
        for (let index = points.length - 1; index >= 0; index--) path += `V${f.y(base[index]).toFixed(1)}H${x(index).toFixed(1)}`;
        nodes.push(svg("path", { d: `${path}Z`, fill: `var(--${category})`, "data-category": category }));
        upper.forEach((size, index) => { base[index] = size; });
      }
      const center = x(peak) + column / 2;
      const leftHalf = center < (f.left + f.right) / 2;
      if (whole && stage.allocator_peak_bytes !== null) {
        nodes.push(svg("path", { class: "allocator-peak", d: `M${f.left} ${f.y(stage.allocator_peak_bytes)}H${f.right}` }),
          svg("text", { class: "halo", x: leftHalf ? f.right : f.left + 4, y: f.y(stage.allocator_peak_bytes) - 6, "text-anchor": leftHalf ? "end" : "start" }, `allocator ${bytes(stage.allocator_peak_bytes)}`));
      }
      if (whole) {
        const edge = Math.max(f.left + 70, Math.min(f.right - 70, center));
        const dot = f.y(points[peak].total);
        // On a phone the allocator's label needs the room above the dot.
        const below = width < 560 && stage.allocator_peak_bytes !== null && dot - f.y(stage.allocator_peak_bytes) < 24;
        nodes.push(svg("circle", { class: "peak-dot", id: "peak-marker", cx: center, cy: dot, r: 4.5 }),
          svg("text", { class: "strong halo", x: edge, y: below ? dot + 20 : Math.max(12, dot - 10), "text-anchor": "middle" }, `${stage.allocator_peak_bytes === null ? "" : "ledger "}peak ${bytes(points[peak].total)}`));
      }
      nodes.push(...phases(points, x, f.bottom + 8));
      nodes.push(...marks(spans, (index) => x(Math.min(index / stretch, points.length)), f.bottom + 28));
      nodes.push(svg("text", { x: f.left, y: height - 4 }, count(all.length, "event")));
      return { nodes, bottom: f.bottom, x: (index) => x(index) + column / 2, index: (px) => Math.floor((px - f.left) / column) };
    }
    function describe(index) {
      const sample = points[index];
      const many = sample.to - sample.from;
      const rows = [...shown()].reverse().filter((category) => sample.held[category]).map((category) =>
        el("tr", {}, el("td", {}, swatch(category), label(category)), el("td", {}, bytes(sample.held[category]))));
      const total = visibleTotal(sample);
      const span = spans.find(({ from, to }) => from < sample.at && sample.at < to);
      return {
        title: sample.name, text: `${sample.name}${span ? `, in ${span.name}` : ""}: ${bytes(total)}`,
        rows: [span ? el("span", { class: "block" }, `in ${span.name}`) : null, many > 1 ? el("span", { class: "muted" }, `highest of ${many} events`) : null,
          el("table", {}, rows, el("tr", { class: "total" }, el("td", {}, "total"), el("td", {}, bytes(total))))].filter(Boolean),
      };
    }
    const view = chart({ id: "timeline-chart", name: "Live bytes over one step", height, length: points.length, draw, describe });
    const legend = el("div", { class: "legend", role: "group", "aria-label": "Categories shown" }, categories.map((category) =>
      el("button", { type: "button", "aria-pressed": "true", onclick: (event) => {
        if (hidden.has(category)) hidden.delete(category); else hidden.add(category);
        event.currentTarget.setAttribute("aria-pressed", String(!hidden.has(category)));
        view.redraw();
      } }, swatch(category), label(category))));
    return card("timeline", "Timeline of one step", note, legend, view.box);
  }

  // Neighbours whose names start with the same word ("forward", "backward") share one piece of the strip.
  function phases(points, x, y) {
    // The ledger adds an event of its own at the peak, named after the one that it lies in.
    const ownWord = (sample) => firstWord(sample.name.replace(/^peak, in /, ""));
    // A mark has a strip of its own; here it goes with what comes after it, or else before it.
    const words = points.map(ownWord).map((word) => (LEDGER_WORDS.has(word) ? word : null));
    for (let index = words.length - 2; index >= 0; index--) words[index] ??= words[index + 1];
    for (let index = 1; index < words.length; index++) words[index] ??= words[index - 1];
    const strips = [];
    const labels = [];
    let from = 0;
    for (let index = 1; index <= points.length; index++) {
      if (index < points.length && words[index] === words[from]) continue;
      const width = x(index) - x(from);
      const same = points.slice(from, index).every((sample) => sample.name === points[from].name);
      const text = [points[from].name, words[from] || ownWord(points[from])].find((name, short) => (short || same) && name.length * 6.4 + 10 < width);
      strips.push(svg("rect", { class: strips.length % 2 ? "phase odd" : "phase", x: x(from), y, width, height: 16 }));
      if (text) labels.push(svg("text", { x: x(from) + width / 2, y: y + 12, "text-anchor": "middle" }, text));
      from = index;
    }
    return [...strips, ...labels];
  }

  // Marks in a row that begin with the same word ("microbatch 1 of 4") are labelled alike: all in full, all as
  // "1/4", or, where there is no room for that, together.
  function marks(spans, x, y) {
    const strips = [];
    const labels = [];
    const fits = (text, width) => text.length * 6.4 + 6 < width;
    const write = (text, from, to) => labels.push(svg("text", { x: (x(from) + x(to)) / 2, y: y + 12, "text-anchor": "middle" }, text));
    const short = (name) => name.replace(/^.*?(\d+) of (\d+)$/, "$1/$2");
    let first = 0;
    spans.forEach((span, index) => {
      strips.push(svg("rect", { class: index % 2 ? "mark odd" : "mark", x: x(span.from), y, width: Math.max(0, x(span.to) - x(span.from)), height: 16 }, svg("title", {}, span.name)));
      const next = spans[index + 1];
      if (next && firstWord(next.name) === firstWord(span.name) && next.from === span.to) return;
      const row = spans.slice(first, index + 1);
      first = index + 1;
      const width = (one) => x(one.to) - x(one.from);
      const style = [(name) => name, short].find((style) => row.every((one) => fits(style(one.name), width(one))));
      const together = `${firstWord(span.name)} \u00d7 ${row.length}`;
      if (style) row.forEach((one) => write(style(one.name), one.from, one.to));
      else if (row.length > 1 && fits(together, x(span.to) - x(row[0].from))) write(together, row[0].from, span.to);
    });
    return [...strips, ...labels];
  }

  function steps(name) {
    const run = report.steps[name];
    if (!run || !run.step.length) return null;
    // Level with the categories beside it; growth, where there is any, takes a part of that height.
    const height = (report.growth[name] || []).length ? 190 : 336;
    const highest = Math.max(...run.peak_bytes);
    const at = run.peak_bytes.indexOf(highest);
    const [first, last] = [run.step[0], run.step[run.step.length - 1]];
    function draw(width) {
      const f = frame(width, height, Math.max(1, highest) * 1.04, 24);
      const x = (index) => f.left + 6 + ((run.step[index] - first) / Math.max(1, last - first)) * (f.right - f.left - 12);
      const path = run.peak_bytes.map((size, index) => `${index ? "L" : "M"}${x(index).toFixed(1)} ${f.y(size).toFixed(1)}`).join("");
      const dots = run.step.map((_, index) => index).filter((index) => run.step.length <= 60 || (run.ledger[index] && run.step.length <= 600));
      const nodes = [...f.nodes, svg("path", { class: "steps-line", d: path }),
        dots.map((index) => svg("circle", { class: run.ledger[index] ? "peak-dot" : "steps-dot", cx: x(index), cy: f.y(run.peak_bytes[index]), r: run.ledger[index] ? 3.5 : 2 })),
        svg("text", { x: f.left, y: height - 4 }, `step ${first}`)];
      if (last > first) nodes.push(svg("text", { x: f.right, y: height - 4, "text-anchor": "end" }, `step ${last}`));
      const nearest = (px) => run.step.reduce((best, _, index) => (Math.abs(x(index) - px) < Math.abs(x(best) - px) ? index : best), 0);
      return { nodes, bottom: f.bottom, x, index: nearest };
    }
    const describe = (index) => ({
      title: `Step ${run.step[index]}`, text: `Step ${run.step[index]}: ${bytes(run.peak_bytes[index])}`,
      rows: [el("span", {}, `peak ${bytes(run.peak_bytes[index])}`), run.ledger[index] ? el("span", { class: "muted" }, ", with the ledger") : null].filter(Boolean),
    });
    const view = chart({ id: "steps-chart", name: "Peak of every step", height, length: run.step.length, draw, describe });
    return card("steps", "Peaks over steps",
      `${count(run.count, "step")}; the highest is ${bytes(highest)} in step ${run.step[at]}. Rings mark steps that the ledger watched.`, view.box);
  }

  // ---- tables -------------------------------------------------------------------------------------------
  function categories(stage) {
    const peak = sum(Object.values(stage.at_peak));
    const known = stage.allocator_peak_bytes !== null;
    const row = (name, held, most, bar, sub) => el("tr", { class: sub ? "sub" : null },
      el("th", { scope: "row" }, name), el("td", {}, bytes(held)), el("td", {}, share(held, peak)), el("td", { class: "bar" }, bar), el("td", {}, most === null ? "" : bytes(most)));
    const bar = (category, held, hatch) => held > 0 && peak > 0 ? el("div", { class: "stack", "aria-hidden": "true" },
      el("i", { class: hatch ? "hatch" : null, style: `background-color:var(--${category});width:${(100 * held) / peak}%` })) : null;
    const none = (category) => UNUSUAL.includes(category) && !stage.at_peak[category] && !stage.maxima[category];
    const rows = ROWS.filter((category) => (known || category !== "workspace") && !none(category)).flatMap((category) => {
      const held = stage.at_peak[category];
      const own = row([swatch(category), ` ${label(category)}`], held, category === "workspace" ? null : stage.maxima[category], bar(category, held));
      if (category !== "activations" || !stage.recomputed_max_bytes) return [own];
      return [own, row("of which recomputed", stage.recomputed_at_peak_bytes, stage.recomputed_max_bytes, bar(category, stage.recomputed_at_peak_bytes, true), true)];
    });
    return card("categories", "Categories",
      known ? "The rows add up to what the device's allocator counted. A maximum may lie at another moment than the peak." : "The rows add up to the ledger's peak; this device has no allocator figure. A maximum may lie at another moment than the peak.",
      el("div", { class: "scroll" }, el("table", { class: "data" },
        el("thead", {}, el("tr", {}, ["Category", "At the peak", "Share", "", "Maximum"].map((name) => name ? el("th", { scope: "col" }, name) : el("td", { class: "bar" })))),
        el("tbody", {}, rows),
        el("tfoot", {}, el("tr", {}, el("th", { scope: "row" }, known ? "allocator" : "ledger"), el("td", {}, bytes(peak)), el("td", {}, share(peak, peak)), el("td", { class: "bar" }), el("td", {}))))));
  }

  const MODULE_COLUMNS = [
    ["name", "Module"], ["total", "Total"], ["produced_bytes", "Produced"], ["saved_bytes", "Saved"], ["parameters_bytes", "Parameters"],
    ["gradients_bytes", "Gradients"], ["optimizer_state_bytes", "Optimizer state"], ["buffers_bytes", "Buffers"]];
  const MODULE_PARTS = { parameters: "parameters_bytes", buffers: "buffers_bytes", optimizer_state: "optimizer_state_bytes", gradients: "gradients_bytes", activations: "produced_bytes" };
  const FIRST_ROWS = 20;

  function modules(stage) {
    if (!stage.modules.length) return null;
    const rows = stage.modules.map((module) => {
      const held = Object.fromEntries(Object.entries(MODULE_PARTS).map(([category, field]) => [category, module[field]]));
      return { ...module, held, total: sum(Object.values(held)) };
    });
    const largest = Math.max(1, ...rows.map((row) => row.total));
    const state = { key: "total", direction: -1, filter: "", all: false };
    const body = el("tbody", {});
    const more = el("button", { type: "button", class: "more", onclick: () => { state.all = true; fill(); } });
    const found = el("span", { class: "small muted", role: "status" });
    const columns = MODULE_COLUMNS.filter(([key]) => key === "name" || rows.some((row) => row[key]));
    const heads = columns.map(([key, name]) => el("th", { scope: "col", "data-key": key },
      el("button", { type: "button", onclick: () => {
        state.direction = state.key === key ? -state.direction : key === "name" ? 1 : -1;
        state.key = key;
        fill();
      } }, name)));
    function line(row) {
      return el("tr", {},
        el("td", { class: "name" }, el("span", { class: "mono" }, breakable(row.name || "(model)")), " ", el("span", { class: "small muted" }, row.type_name)),
        el("td", { class: "bar" }, stackBar(row.held, largest, bytes(row.total))),
        columns.slice(1).map(([key]) => el("td", { class: row[key] ? null : "muted" }, row[key] ? bytes(row[key]) : "0")));
    }
    function fill() {
      const { key, direction } = state;
      const matching = rows.filter((row) => `${row.name} ${row.type_name}`.toLowerCase().includes(state.filter));
      matching.sort((a, b) => direction * (key === "name" ? a.name.localeCompare(b.name, "en", { numeric: true }) : a[key] - b[key]));
      const visible = state.all ? matching : matching.slice(0, FIRST_ROWS);
      body.replaceChildren(...visible.map(line));
      for (const head of heads) {
        if (head.dataset.key === key) head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
        else head.removeAttribute("aria-sort");
      }
      more.textContent = `Show all ${matching.length.toLocaleString("en")} modules`;
      more.hidden = visible.length === matching.length;
      found.textContent = state.filter ? `${count(matching.length, "module")}` : "";
    }
    fill();
    const search = rows.length > 8 ? el("div", { class: "tools" },
      el("input", { type: "search", placeholder: "Filter modules", "aria-label": "Filter modules", oninput: (event) => { state.filter = event.target.value.toLowerCase(); fill(); } }), found) : null;
    return card("modules", "Modules at the peak",
      "Each byte belongs to the innermost module that made it; saved is the part that a module keeps for its backward pass and is not added to the total. Click a heading to sort.",
      search,
      el("div", { class: "scroll" }, el("table", { class: "data modules" }, el("thead", {}, el("tr", {}, heads[0], el("td", { class: "bar" }), heads.slice(1))), body)), more);
  }

  function sites(stage) {
    if (!(stage.sites || []).length) return null;
    const place = (site) => site.file ? `${site.in_backward ? "backward of " : ""}${site.file}:${site.line}` : site.was_there ? "there before the step" : site.line || "not known";
    const rows = stage.sites.map((site) => el("tr", {},
      el("td", { class: "name" }, el("span", { class: "mono" }, breakable(place(site))), " ", el("span", { class: "small muted" }, site.function)),
      el("td", {}, bytes(site.num_bytes)), el("td", { class: "left" }, site.category ? swatch(site.category) : null, ` ${label(site.category)}`), el("td", { class: "left mono" }, site.module), el("td", {}, site.num_storages.toLocaleString("en"))));
    const body = el("tbody", {}, rows.slice(0, FIRST_ROWS));
    const more = rows.length > FIRST_ROWS ? el("button", { type: "button", class: "more", onclick: () => { body.append(...rows.slice(FIRST_ROWS)); more.remove(); } }, `Show all ${rows.length.toLocaleString("en")} lines`) : null;
    return card("sites", "Your lines of code", "Which line has made what is live at the peak. What a backward makes is told by the line that it is the backward of.",
      el("div", { class: "scroll" }, el("table", { class: "data" },
        el("thead", {}, el("tr", {}, ["Line", "Bytes", "Used for", "Module", "Storages"].map((text, at) => el("th", { scope: "col", class: at === 2 || at === 3 ? "left" : null }, text)))), body)), more);
  }

  function growth(name) {
    const rows = report.growth[name] || [];
    if (!rows.length) return null;
    return card("growth", "Growth",
      "Storages that outlived the step that made them and are no training state. The usual cause is a logged or collected tensor that keeps its graph: detach it.",
      el("div", { class: "scroll" }, el("table", { class: "data" },
        el("thead", {}, el("tr", {}, ["Made by", "Bytes", "Storages"].map((text) => el("th", { scope: "col" }, text)))),
        el("tbody", {}, rows.map((row) => el("tr", {}, el("td", { class: "name mono" }, row.module || "(outside of any submodule)"), el("td", {}, bytes(row.num_bytes)), el("td", {}, row.num_storages.toLocaleString("en"))))))));
  }

  function predicted() {
    const known = report.predicted;
    if (!known) return null;
    if (known.failure) return card("predicted", "Predicted before the run", null, el("p", {}, `Nothing was predicted: ${known.failure}`));
    const off = (row) => (row.off === null || Math.abs(row.off) >= 10 ? "" : `${row.off >= 0 ? "+" : "\u2212"}${rounded(Math.abs(row.off) * 100, 2)}%`);
    return card("predicted", "Predicted before the run", `Of the training step with the highest peak: what was predicted before the run, for ${known.device}, and what was counted in it.`,
      el("div", { class: "scroll" }, el("table", { class: "data" },
        el("thead", {}, el("tr", {}, ["Figure", "Predicted", "Counted", "Off by"].map((text) => el("th", { scope: "col" }, text)))),
        el("tbody", {}, report.compared.map((row) => el("tr", {}, el("th", { scope: "row" }, label(row.name)), el("td", {}, bytes(row.predicted)), el("td", {}, bytes(row.counted)), el("td", {}, off(row))))))),
      known.unknown.map((one) => el("p", { class: "note" }, `Nobody knew beforehand: ${one}`)));
  }

  function outOfMemory() {
    const failure = report.out_of_memory;
    if (!failure) return null;
    return el("section", { class: "card oom", id: "out-of-memory", role: "alert" },
      el("h2", {}, `Out of memory in ${failure.stage}, step ${failure.step}, with ${bytes(failure.held_bytes)} held`),
      el("p", { class: "mono" }, failure.message),
      el("p", { class: "small muted" }, "The largest holders, and what would help:"),
      el("ol", {}, failure.holders.map((holder) => el("li", {}, el("b", {}, `${holder.name}, ${bytes(holder.num_bytes)}: `), holder.advice))));
  }

  const FIRST_EVENTS = 5;
  function techniques() {
    if (!report.techniques.length) return null;
    const value = (setting) => setting === null ? "none" : setting === true ? "yes" : setting === false ? "no" : String(setting);
    const list = (events) => el("ol", {}, events.map((event) => el("li", {}, event)));
    return card("techniques", "Techniques", "What made the steps need less memory, with the settings in force at the end of the run.",
      report.techniques.map(({ name, settings, events }) => el("div", { class: "technique" },
        el("h3", {}, name),
        el("dl", { class: "settings" }, Object.entries(settings).map(([key, setting]) => el("div", {}, el("dt", {}, key), el("dd", {}, value(setting))))),
        !events.length ? null : events.length <= FIRST_EVENTS ? list(events)
          : el("details", {}, el("summary", {}, count(events.length, "event")), list(events)))));
  }

  const words = (entries) => el("dl", { class: "words" }, Object.entries(entries).map(([term, text]) => [el("dt", {}, term), el("dd", {}, text)]));

  const folded = (title, ...cards) => el("details", { class: "fold" }, el("summary", {}, title), ...cards.filter(Boolean));

  // ---- page ---------------------------------------------------------------------------------------------
  // Training comes first, whatever holds most.
  const names = Object.keys(report.stages).sort((a, b) => (b === "fit") - (a === "fit"));
  const panel = el("div", { id: "panel" });
  function show(name) {
    for (const tab of tabs) {
      tab.setAttribute("aria-selected", String(tab.dataset.stage === name));
      tab.tabIndex = tab.dataset.stage === name ? 0 : -1;
    }
    const stage = report.stages[name];
    const overRun = [steps(name), growth(name)].filter(Boolean);
    const summary = overRun.length ? el("div", { class: "two wide" }, categories(stage), el("div", {}, overRun)) : categories(stage);
    // Beside training, other stages are told in short.
    const short = name !== "fit" && names.includes("fit");
    panel.replaceChildren(...(short
      ? [headline(stage, name), summary, folded("Timeline and modules", timeline(stage), modules(stage), sites(stage))]
      : [headline(stage, name), timeline(stage), summary, modules(stage), sites(stage)]).filter(Boolean));
  }
  const tabs = names.map((name) => el("button", { type: "button", role: "tab", "data-stage": name, "aria-controls": "panel", onclick: () => show(name) }, name));
  const tabList = names.length > 1 ? el("div", { class: "tabs", role: "tablist", "aria-label": "Stage", onkeydown: (event) => {
    const turn = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!turn) return;
    const next = tabs[(tabs.indexOf(document.activeElement) + turn + tabs.length) % tabs.length];
    next.focus();
    show(next.dataset.stage);
  } }, tabs) : null;
  if (tabList) panel.setAttribute("role", "tabpanel");

  const created = new Date(report.created);
  const when = Number.isNaN(created.getTime()) ? report.created : `${created.toISOString().slice(0, 16).replace("T", " ")} UTC`;
  page.replaceChildren(el("main", {},
    el("header", { class: "top" },
      el("div", {}, el("p", { class: "overline" }, "Memory report"), el("h1", {}, report.model),
        el("span", { class: "muted" }, `${count(report.num_parameters, "parameter")}, ${when}`)),
      tabList),
    outOfMemory(),
    names.length ? panel : el("section", { class: "card" }, "No step was profiled."),
    predicted(),
    techniques(),
    el("div", { class: "two" },
      card("environment", "Environment", null, words(report.environment)),
      el("section", { class: "card" }, el("details", {}, el("summary", {}, "What the words mean"), words(WORDS))))));
  if (names.length) show(names[0]);
})();
