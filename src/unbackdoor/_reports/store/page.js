"use strict";
(() => {
  const source = document.getElementById("numbers");
  const data = JSON.parse(source.textContent);
  const pack = Number(source.dataset.pack);
  const words = data.words;
  const texts = new Set(data.text);
  const rows = data.rows.map((line, place) => {
    const row = { place };
    data.fields.forEach((name, at) => { row[name] = texts.has(name) && line[at] !== null ? words[line[at]] : line[at]; });
    return row;
  });
  const byId = (id) => document.getElementById(id);

  // All text of others goes in as text nodes or attributes, never as markup.
  const make = (tag, attributes, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === true) made.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  };
  const draw = (tag, attributes, ...children) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };
  const percent = (share) => (100 * share).toFixed(1);
  const rateText = (rate) => rate === null ? "not known" : `${Number((100 * rate).toPrecision(10))}\u00a0%`;
  const mean = (spread) => spread ? spread[0] : null;
  const collator = new Intl.Collator("en", { numeric: true });

  // Filters. What is there for comparison passes: the clean control any attack, a baseline any method.
  const kinds = {
    task: (row, wanted) => row.task === wanted,
    attack: (row, wanted) => row.control || row.attack === wanted,
    rate: (row, wanted) => row.control || String(row.rate) === wanted,
    budget: (row, wanted) => row.budgetless || row.budget === wanted,
    method: (row, wanted) => row.baseline !== "" || row.method === wanted,
  };
  const chosen = {};
  for (const kind of Object.keys(kinds)) {
    const select = byId(`filter-${kind}`);
    let mine = rows;
    if (kind === "attack" || kind === "rate") mine = rows.filter((row) => !row.control);
    if (kind === "budget") mine = rows.filter((row) => !row.budgetless);
    let values = [...new Set(mine.map((row) => kind === "rate" ? String(row.rate) : row[kind]))];
    if (kind === "rate") values.sort((a, b) => Number(b) - Number(a));
    else if (kind !== "method") values.sort(collator.compare);
    select.append(make("option", { value: "" }, "all"));
    values.forEach((value, at) => {
      select.append(make("option", { value: String(at + 1) }, kind === "rate" ? rateText(value === "null" ? null : Number(value)) : value));
    });
    select.disabled = values.length < 2;
    select.addEventListener("change", () => {
      chosen[kind] = select.value === "" ? undefined : values[Number(select.value) - 1];
      show();
    });
  }
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("reset", () => {
    for (const kind of Object.keys(kinds)) chosen[kind] = undefined;
    show();
  });
  const passes = (row) => Object.entries(kinds).every(([kind, test]) => chosen[kind] === undefined || test(row, chosen[kind]));

  // Tables that sort.
  const compare = (sign) => (a, b) => {
    const [x, y] = [a.value, b.value];
    if (x === null || y === null) return x === y ? 0 : x === null ? 1 : -1; // what is absent comes last, either way
    return sign * (typeof x === "string" ? collator.compare(x, y) : x - y);
  };
  const sorted = (items, state, values) => {
    const read = values[state.by]; // none where the column is filtered away
    if (read === undefined) return items;
    return items.map((item) => ({ item, value: read(item) })).sort(compare(state.sign)).map((each) => each.item);
  };
  const heading = (text, by, state, redraw, attributes) => {
    const button = make("button", { type: "button" }, text);
    const cell = make("th", { scope: "col", ...attributes }, button);
    if (state.by === by) cell.setAttribute("aria-sort", state.sign > 0 ? "ascending" : "descending");
    button.addEventListener("click", () => {
      if (state.by === by && state.sign < 0) state.by = null;
      else if (state.by === by) state.sign = -1;
      else { state.by = by; state.sign = 1; }
      state.focus = by;
      redraw();
    });
    if (state.focus === by) queueMicrotask(() => { if (button.isConnected) { button.focus(); state.focus = undefined; } });
    return cell;
  };
  const region = (name, table) => make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": name }, table);

  const small = (spread, form) => {
    const around = spread[1] !== null ? `± ${form(spread[1])}` : spread.length > 5 ? `${form(spread[5])} to ${form(spread[6])}` : "";
    return make("small", {}, `${around}${around ? ", " : ""}n = ${spread[2]}`);
  };
  const flags = (row) => {
    const made = [];
    if (row.not_implanted) made.push(make("span", { class: "flag" }, row.counted ? `† ${row.not_implanted} not implanted, left out` : "† not implanted"));
    if (row.failed) made.push(make("span", { class: "flag" }, `✕ ${row.failed} failed`));
    if (row.unusable) made.push(make("span", { class: "flag" }, `§ ${row.unusable} not usable`));
    if (row.unknown) made.push(make("span", { class: "flag doubt" }, "? not known if implanted"));
    return made.flatMap((flag, at) => at ? [make("br"), flag] : [flag]);
  };
  const shareCell = (spread, attributes) => spread ? make("td", attributes, make("b", {}, percent(spread[0])), small(spread, percent)) : make("td", attributes, "–");

  const nats = (loss) => loss.toFixed(3);
  const lossCell = (spread, attributes) => make("td", attributes, make("b", {}, nats(spread[0])), small(spread, nats));

  // Methods by attacks.
  const states = data.blocks.map(() => ({ by: null, sign: 1 }));
  const holder = byId("blocks");
  const drawBlock = (block, state, old) => {
    const columns = block.columns.map((name, at) => ({ name, at }))
      .filter((column) => block.cells.some((line) => line[column.at] !== null && passes(rows[line[column.at]])));
    const lines = block.methods.map((method, at) => ({ method, line: block.cells[at] })).filter((each) => {
      const present = each.line.filter((place) => place !== null);
      return !present.length || present.some((place) => passes(rows[place]));
    });
    const title = `${block.task}, ${block.budget === "none" ? "no clean examples" : `clean budget: ${block.budget} examples`}${block.apart ? ", all-to-all attacks (not comparable with others)" : ""}`;
    const box = make("div", {});
    if (!columns.length || !lines.some((each) => each.line.some((place) => place !== null))) { box.hidden = true; return box; }
    const values = { method: (each) => each.method };
    for (const column of columns) {
      for (const measure of ["clean_accuracy", "clean_loss", "attack_success"]) {
        values[`${measure} ${column.at}`] = (each) => each.line[column.at] === null ? null : mean(rows[each.line[column.at]][measure]);
      }
    }
    const redraw = () => { const fresh = drawBlock(block, state, box); box.replaceWith(fresh); };
    const top = make("tr", {}, make("td", { class: "corner" }));
    const second = make("tr", {}, heading("method", "method", state, redraw));
    for (const column of columns) column.control = block.cells.some((line) => line[column.at] !== null && rows[line[column.at]].control);
    const attacks = columns.filter((column) => !column.control);
    const over = (each) => {
      const found = attacks.map((column) => each.line[column.at]).filter((place) => place !== null && passes(rows[place]))
        .map((place) => mean(rows[place].attack_success)).filter((value) => value !== null);
      return { n: found.length, worst: found.length ? Math.max(...found) : null, mean: found.length ? found.reduce((a, b) => a + b) / found.length : null };
    };
    const several = lines.some((each) => over(each).n > 1);
    if (several) {
      top.append(make("th", { scope: "colgroup", colspan: 2, class: "group" }, "success over attacks"));
      for (const name of ["worst", "mean"]) {
        values[name] = (each) => over(each)[name];
        second.append(heading(name, name, state, redraw, name === "worst" ? { class: "group" } : {}));
      }
    }
    for (const column of columns) {
      const control = column.control;
      top.append(make("th", { scope: "colgroup", colspan: control ? 1 : 2, class: "group" }, column.name));
      const loss = block.cells.some((line) => line[column.at] !== null && rows[line[column.at]].clean_loss);
      const shot = block.cells.some((line) => line[column.at] !== null && rows[line[column.at]].zero_shot);
      second.append(heading(loss ? "loss" : shot ? "zero-shot" : "accuracy", `clean_${loss ? "loss" : "accuracy"} ${column.at}`, state, redraw, { class: "group" }));
      if (!control) second.append(heading("success", `attack_success ${column.at}`, state, redraw, {}));
    }
    const body = make("tbody", {});
    for (const each of sorted(lines, state, values)) {
      const present = each.line.find((place) => place !== null);
      const baseline = present === undefined || rows[present].baseline !== "";
      const line = make("tr", { class: baseline ? "baseline" : null }, make("th", { scope: "row" }, each.method === "none" ? "none (before any method)" : each.method));
      if (several) {
        const found = over(each);
        const cell = (value, attributes) => value === null ? make("td", attributes, "–") : make("td", attributes, make("b", {}, percent(value)));
        const worst = cell(found.worst, { class: "group" });
        if (found.n) worst.append(make("small", {}, `of ${found.n} ${found.n === 1 ? "attack" : "attacks"}`));
        line.append(worst, cell(found.mean, {}));
      }
      for (const column of columns) {
        const place = each.line[column.at];
        const row = place === null ? null : rows[place];
        const span = column.control ? 1 : 2;
        if (row === null || !passes(row)) { line.append(make("td", { class: "group muted", colspan: span }, "not run")); continue; }
        if (!row.counted) { line.append(make("td", { class: "group", colspan: span }, ...flags(row))); continue; }
        const accuracy = row.clean_loss ? lossCell(row.clean_loss, { class: "group" }) : shareCell(row.clean_accuracy, { class: "group" });
        line.append(accuracy);
        const last = column.control ? accuracy : shareCell(row.attack_success, {});
        if (!column.control) {
          if (row.false_activation) last.append(make("small", {}, `false ${percent(row.false_activation[0])}, empty ${percent(row.empty[0])}`));
          if (row.flip_rate) last.append(make("small", {}, `clean flips ${percent(row.flip_rate[0])}`));
          line.append(last);
        }
        last.append(...flags(row));
      }
      body.append(line);
    }
    const counts = (name) => [...new Set(block.cells.flat().filter((place) => place !== null).map((place) => rows[place][name]).filter((n) => n))].map((n) => n.toLocaleString("en")).join(", ") || "no";
    box.append(make("h3", {}, title), make("p", { class: "muted" }, `${counts("clean_n")} clean and ${counts("triggered_n")} triggered test examples.`),
      region(title, make("table", { class: "numbers matrix" }, make("thead", {}, top, second), body)));
    return box;
  };

  // Pictures.
  const names = [...new Set(rows.map((row) => row.method))];
  names.sort((a, b) => (b === "none") - (a === "none") || (b === "fine-tuning") - (a === "fine-tuning") || collator.compare(a, b));
  const look = new Map(names.map((name, at) => [name, { colour: at % 9, shape: at % 5 }]));
  const shapes = [
    (x, y) => `M${x - 4.5} ${y}a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0`,
    (x, y) => `M${x - 4} ${y - 4}h8v8h-8z`,
    (x, y) => `M${x} ${y - 5.5}l5.5 5.5l-5.5 5.5l-5.5 -5.5z`,
    (x, y) => `M${x} ${y - 5}l5 9h-10z`,
    (x, y) => `M${x} ${y + 5}l5 -9h-10z`,
  ];
  const mark = (method, x, y) => draw("path", { class: `mark c${look.get(method).colour}`, d: shapes[look.get(method).shape](Number(x.toFixed(1)), Number(y.toFixed(1))) });
  const legend = (methods) => make("ul", { class: "key" }, ...names.filter((name) => methods.has(name)).map((name) => {
    const sign = draw("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" });
    sign.append(mark(name, 8, 8));
    return make("li", {}, sign, make("span", {}, name === "none" ? "none (before any method)" : name));
  }));
  const frame = (size, axes, label) => {
    const [width, height] = size;
    const [left, bottom] = [46, height - 40];
    const x = (value) => left + (width - left - 14) * (value - axes.x[0]) / (axes.x[1] - axes.x[0]);
    const y = (value) => bottom - (bottom - 12) * value;
    const picture = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
    for (const step of [0, 0.25, 0.5, 0.75, 1]) {
      picture.append(draw("line", { class: "grid", x1: left, x2: width - 14, y1: y(step), y2: y(step) }));
      picture.append(draw("text", { class: "tick", x: left - 6, y: y(step) + 4, "text-anchor": "end" }, `${100 * step}\u202f%`));
    }
    for (const [value, text] of axes.ticks) {
      picture.append(draw("line", { class: "grid", x1: x(value), x2: x(value), y1: 12, y2: bottom }));
      picture.append(draw("text", { class: "tick", x: x(value), y: bottom + 16, "text-anchor": "middle" }, text));
    }
    picture.append(draw("text", { class: "tick", x: (left + width - 14) / 2, y: height - 5, "text-anchor": "middle" }, axes.name));
    return { picture, x, y };
  };
  const about = (row) => `${row.task}, ${row.budget === "none" ? "" : `${row.budget}, `}${row.column}: ${row.method}; ${row.clean_loss ? `loss ${nats(row.clean_loss[0])}` : `accuracy ${percent(row.clean_accuracy[0])}`}, attack success ${percent(row.attack_success[0])}, n = ${row.counted}`;
  const niceStep = (span) => { const rough = span / 6; const power = 10 ** Math.floor(Math.log10(rough)); return power * [1, 2, 5, 10].find((each) => each * power >= rough); };
  const apartTitle = (apart) => apart ? [make("h3", {}, "All-to-all attacks")] : [];
  const nothing = () => make("p", { class: "muted" }, "Nothing to draw with these filters.");
  const both = (found, one) => {
    const made = [];
    for (const apart of [0, 1]) {
      const mine = found.filter((row) => row.apart === apart);
      const drawn = mine.length ? one(mine) : [];
      if (drawn.length) made.push(...apartTitle(apart), ...drawn);
    }
    return made.length ? made : [nothing()];
  };

  const narrow = matchMedia("(max-width: 48rem)"); // a picture made smaller would have letters too small to read
  narrow.addEventListener("change", () => show());
  const cloud = (found, measure, axes, label) => {
    const { picture, x, y } = frame(narrow.matches ? [360, 330] : [680, 400], axes, label);
    for (const row of found) {
      const [cx, cy] = [x(axes.read(row)), y(row.attack_success[0])];
      const group = draw("g", { class: `c${look.get(row.method).colour}` }, draw("title", {}, about(row)));
      const sd = row.attack_success[1];
      if (sd) group.append(draw("path", { class: "whisker", d: `M${cx.toFixed(1)} ${y(Math.max(0, row.attack_success[0] - sd)).toFixed(1)}V${y(Math.min(1, row.attack_success[0] + sd)).toFixed(1)}` }));
      if (measure !== "seconds" && row[measure][1]) {
        const [least, most] = axes.x;
        const [low, high] = [Math.max(least, row[measure][0] - row[measure][1]), Math.min(most, row[measure][0] + row[measure][1])];
        group.append(draw("path", { class: "whisker", d: `M${x(low).toFixed(1)} ${cy.toFixed(1)}H${x(high).toFixed(1)}` }));
      }
      group.append(mark(row.method, cx, cy));
      picture.append(group);
    }
    return make("div", { class: "figure" }, picture, legend(new Set(found.map((row) => row.method))));
  };
  const scatter = (measure, scale, quantity, unit) => (found) => {
    const values = found.flatMap((row) => [-1, 0, 1].map((sign) => row[measure][0] + sign * (row[measure][1] || 0)));
    let [low, high] = [Math.min(0, ...values), Math.max(0.02, ...values)];
    const step = niceStep(scale * (high - low)) / scale;
    [low, high] = [Math.floor(low / step - 0.2) * step, Math.ceil(high / step + 0.2) * step];
    const ticks = [];
    for (let at = Math.round(low / step); at <= Math.round(high / step); at += 1) ticks.push([at * step, String(Number((scale * at * step).toFixed(2)))]);
    const axes = { x: [low, high], ticks, name: `${quantity}, in ${unit}`, read: (row) => row[measure][0] };
    return [cloud(found, measure, axes, `Attack success left against ${quantity}; the numbers stand in the tables.`)];
  };
  const costs = (found) => {
    const logs = found.map((row) => Math.log10(Math.max(1e-3, row.seconds[0])));
    const [low, high] = [Math.floor(Math.min(...logs) - 0.05), Math.ceil(Math.max(...logs) + 0.05)];
    const ticks = [];
    for (let power = low; power <= high; power += 1) {
      ticks.push([power, String(Number((10 ** power).toPrecision(3)))]);
      if (high - low < 3 && power < high) for (const part of [2, 5]) ticks.push([power + Math.log10(part), String(Number((part * 10 ** power).toPrecision(3)))]);
    }
    const axes = { x: [low, high], ticks, name: "seconds", read: (row) => Math.log10(Math.max(1e-3, row.seconds[0])) };
    return [cloud(found, "seconds", axes, "Attack success left against seconds; the numbers stand in the tables.")];
  };
  const FACETS = 24;
  const rates = (found) => {
    const facets = new Map();
    for (const row of found) {
      if (row.rate === null) continue;
      const budgets = row.budgetless ? [...new Set(found.filter((other) => other.task === row.task && !other.budgetless).map((other) => other.budget))] : [row.budget];
      for (const budget of budgets) {
        const name = JSON.stringify([row.task, row.attack, budget]);
        if (!facets.has(name)) facets.set(name, []);
        facets.get(name).push(row);
      }
    }
    const made = [];
    const methods = new Set();
    for (const [name, mine] of facets) {
      const steps = [...new Set(mine.map((row) => row.rate))].sort((a, b) => a - b);
      if (steps.length < 2) continue;
      const [task, attack, budget] = JSON.parse(name);
      if (made.length < FACETS) {
        const axes = { x: [-0.3, steps.length - 0.7], ticks: steps.map((rate, at) => [at, rateText(rate)]), name: "poison rate" };
        const { picture, x, y } = frame([340, 230], axes, `Attack success against poison rate, ${attack}; the numbers stand in the tables.`);
        for (const method of names) {
          const points = mine.filter((row) => row.method === method).sort((a, b) => a.rate - b.rate);
          if (!points.length) continue;
          methods.add(method);
          const at = (row) => [x(steps.indexOf(row.rate)), y(row.attack_success[0])];
          const group = draw("g", { class: `c${look.get(method).colour}` });
          group.append(draw("polyline", { class: "trend", points: points.map((row) => at(row).map((value) => value.toFixed(1)).join(",")).join(" ") }));
          for (const row of points) group.append(draw("g", {}, draw("title", {}, about(row)), mark(method, ...at(row))));
          picture.append(group);
        }
        made.push(make("figure", { class: "chart" }, make("figcaption", {}, make("b", {}, attack), make("span", { class: "muted" }, `${task}, ${budget}`)), picture));
      } else made.push(null);
    }
    const drawn = made.filter((each) => each !== null);
    if (!drawn.length) return [];
    const more = made.length - drawn.length;
    return [legend(methods), make("div", { class: "small" }, ...drawn), more ? make("p", { class: "muted" }, `${more} more; choose by the filters.`) : null].filter((each) => each);
  };

  // Lists that grow.
  const growing = (items, render, into, noun, step) => {
    let count = 0;
    const button = make("button", { type: "button", class: "more" });
    const grow = () => {
      const next = items.slice(count, count + step);
      into.append(...next.map(render));
      count += next.length;
      button.textContent = `Show ${Math.min(step, items.length - count)} more of ${(items.length - count).toLocaleString("en")} ${noun}`;
      button.hidden = count >= items.length;
    };
    button.addEventListener("click", grow);
    grow();
    return button;
  };

  // Every setting.
  const settingState = { by: null, sign: 1 };
  const number = (digits) => (value) => value.toFixed(digits);
  const columns = [
    ["method", (row) => row.method, (row) => row.method],
    ["attack", (row) => row.control ? row.column : row.attack, (row) => row.control ? row.column : row.attack],
    ["poison rate", (row) => row.control ? null : row.rate, (row) => row.control ? "–" : rateText(row.rate)],
    ["task", (row) => row.task, (row) => row.task],
    ["clean budget", (row) => row.budget, (row) => row.budget],
    ["clean accuracy", (row) => mean(row.clean_accuracy), "clean_accuracy", percent],
    ["accuracy lost", (row) => mean(row.accuracy_lost), "accuracy_lost", percent],
    ["attack success", (row) => mean(row.attack_success), "attack_success", percent],
    ["recovered", (row) => mean(row.recovered_accuracy), "recovered_accuracy", percent],
    ["clean model flips", (row) => mean(row.flip_rate), "flip_rate", percent],
    ["clean model’s accuracy", (row) => mean(row.control_accuracy), "control_accuracy", percent],
    ...(rows.some((row) => row.clean_loss) ? [
      ["clean loss", (row) => mean(row.clean_loss), "clean_loss", nats],
      ["loss added", (row) => mean(row.loss_added), "loss_added", nats],
      ["false activation", (row) => mean(row.false_activation), "false_activation", percent],
      ["empty", (row) => mean(row.empty), "empty", percent],
      ["clean model’s loss", (row) => mean(row.control_loss), "control_loss", nats],
      ["loss, second test", (row) => mean(row.second_loss), "second_loss", nats],
    ] : []),
    ...(rows.some((row) => row.second_accuracy || row.second_loss) ? [
      ["accuracy, second test", (row) => mean(row.second_accuracy), "second_accuracy", percent],
      ["attack success, second test", (row) => mean(row.second_success), "second_success", percent],
    ] : []),
    ["seconds", (row) => mean(row.seconds), "seconds", number(1)],
    ["runs", (row) => row.counted, null],
  ];
  const drawSettings = () => {
    const values = Object.fromEntries(columns.map(([name, read]) => [name, read]));
    const found = sorted(rows.filter(passes), settingState, values);
    const body = make("tbody", {});
    const line = (row) => make("tr", {}, ...columns.map(([, , show_, form], at) => {
      if (at < 5) return make(at === 0 ? "th" : "td", at === 0 ? { scope: "row" } : {}, show_(row));
      if (show_ === null) return make("td", {}, `${row.counted}${row.apart ? ", all-to-all" : ""} `, ...flags(row));
      const spread = row[show_];
      return spread ? make("td", {}, make("b", {}, form(spread[0])), small(spread, form)) : make("td", {}, "–");
    }));
    const head = make("tr", {}, ...columns.map(([name]) => heading(name, name, settingState, drawSettings)));
    const table = make("table", { class: "numbers matrix" }, make("thead", {}, head), body);
    const more = growing(found, line, body, "settings", 50);
    byId("settings").replaceChildren(region("Every setting", table), more);
  };

  // Cells, and their records.
  const packs = document.querySelectorAll("script.pack");
  const opened = new Map();
  const recordsOf = (at) => {
    if (!opened.has(at)) {
      const bytes = Uint8Array.from(atob(packs[at].textContent.trim()), (letter) => letter.charCodeAt(0));
      opened.set(at, new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).json());
    }
    return opened.get(at);
  };
  const quoted = (text) => /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\"'\"'")}'`;
  const cellLine = ([key, place, victimSeed, seed, status, grid], at) => {
    const row = rows[place];
    const state = data.states[status];
    const summary = make("summary", {}, make("code", {}, key), make("span", {}, `${row.task}, ${row.column}: ${row.method}${row.budgetless ? "" : `, ${row.budget}`}`),
      make("span", { class: "muted" }, `${victimSeed === null ? "" : `victim seed ${victimSeed}, `}seed ${seed}`),
      status ? make("span", { class: "flag" }, state === "failed" ? "✕ failed" : "† not implanted, left out") : null);
    const box = make("details", { class: "cell" }, summary);
    box.addEventListener("toggle", async () => {
      if (!box.open || box.childElementCount > 1) return;
      const text = data.grids[words[grid]];
      const name = text === null ? quoted(words[grid]) : `${data.store}/grids/${quoted(words[grid])}`;
      const command = `unbackdoor bench ${name} --out ${data.store} --rerun all --only ${key}`;
      const pre = make("pre", { tabindex: "0" }, "…");
      box.append(make("p", {}, "To repeat it:"), make("pre", { class: "command", tabindex: "0" }, command));
      if (data.failures[key] !== undefined) box.append(make("p", { class: "fell" }, data.failures[key]));
      box.append(make("p", { class: "muted" }, text === null ? "The grid is not in the store." : `The grid as it was run is kept in the store as grids/${words[grid]}, and below; the store may be in another folder than the command says.`), pre);
      try {
        pre.textContent = JSON.stringify((await recordsOf(Math.floor(at / pack)))[at % pack], null, 1);
      } catch (problem) {
        pre.textContent = `This browser cannot unpack the record (${problem}). It lies in the store as cells/${key}.json or failed/${key}.json.`;
      }
    });
    return box;
  };
  const drawCells = () => {
    const found = [];
    data.cells.forEach((cell, at) => { if (passes(rows[cell[1]])) found.push([cell, at]); });
    const list = make("div", {});
    byId("lines").replaceChildren(list, growing(found, ([cell, at]) => cellLine(cell, at), list, "cells", 25));
    const failed = byId("failed");
    if (failed) {
      const mine = found.filter(([cell]) => data.states[cell[4]] === "failed");
      const lines = make("tbody", {});
      const line = ([cell]) => make("tr", {}, make("td", {}, make("code", {}, cell[0])), make("th", { scope: "row" }, `${rows[cell[1]].column}: ${rows[cell[1]].method}`),
        make("td", {}, `${cell[2] === null ? "" : `victim seed ${cell[2]}, `}seed ${cell[3]}`), make("td", { class: "message" }, data.failures[cell[0]]));
      const head = make("tr", {}, ...["cell", "setting", "seeds", "message"].map((name) => make("th", { scope: "col" }, name)));
      const table = make("table", {}, make("thead", {}, head), lines);
      const more = growing(mine, line, lines, "failures", 25);
      failed.replaceChildren(mine.length ? region("Failures", table) : make("p", { class: "muted" }, "None with these filters."), more);
    }
    return found.length;
  };

  const show = () => {
    const found = rows.filter(passes);
    holder.replaceChildren(...data.blocks.map((block, at) => drawBlock(block, states[at])));
    const attacked = found.filter((row) => !row.control && row.attack_success && (row.clean_accuracy || row.clean_loss));
    const [losses, lost] = [attacked.filter((row) => row.loss_added), attacked.filter((row) => row.accuracy_lost)];
    const clouds = losses.length ? both(losses, scatter("loss_added", 1, "clean loss added", "nats per answer token")) : [];
    if (lost.length || !losses.length) clouds.unshift(...both(lost, scatter("accuracy_lost", 100, "clean accuracy lost", "points")));
    byId("scatter").replaceChildren(...clouds);
    byId("costs").replaceChildren(...both(attacked.filter((row) => row.seconds && row.baseline !== "none"), costs));
    byId("rates").replaceChildren(...both(attacked, rates));
    byId("rates-section").hidden = !byId("rates").querySelector("svg");
    drawSettings();
    const cells = drawCells();
    byId("shown").textContent = `${found.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} settings, ${cells.toLocaleString("en")} cells`;
  };
  for (const [kept, text] of Object.entries(data.grids)) {
    if (text !== null) byId("grids").append(make("details", { class: "cell" }, make("summary", {}, make("span", {}, `The grid grids/${kept}`)), make("pre", { tabindex: "0" }, text)));
  }
  show();
})();
