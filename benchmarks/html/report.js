"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const number = (x, digits = 3) => (x === null || x === undefined ? "-" : x.toFixed(digits));

  // All text is inserted as text nodes, never as HTML.
  function make(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }
  // Isolate text of either writing direction from its surroundings.
  const isolated = (text) => make("bdi", {}, text);

  function answers({ columns, baseline, rows }) {
    const page = 20;
    for (const [place, row] of rows.entries()) {
      row.place = place;
      for (const cell of row.cells) if (cell && cell.pieces) cell.text = cell.pieces.join("");
      const texts = row.cells.map((cell) => (cell ? cell.text + " " + (cell.error || "") : ""));
      row.all = [row.id, row.prompt, ...texts].join("\n").toLowerCase();
      const scores = row.cells.filter((c) => c && c.score !== null).map((c) => c.score);
      row.best = scores.length ? Math.max(...scores) : null;
      row.spread = scores.length ? row.best - Math.min(...scores) : null;
    }
    const score = (row, k) => (row.cells[k] ? row.cells[k].score : null);
    const minus = (row, k) => {
      const own = score(row, k), other = score(row, baseline);
      return own === null || other === null ? null : own - other;
    };
    const numbered = columns.map((_, k) => k).filter((k) => baseline !== null && k !== baseline);
    const base = baseline === null ? "" : columns[baseline];
    const orders = [
      ["Run order", (row) => -row.place],
      ["Largest score difference", (row) => row.spread],
      ["Highest best score", (row) => row.best],
      ["Lowest best score", (row) => (row.best === null ? null : -row.best)],
      ...numbered.flatMap((k) => [
        [`${columns[k]} most above ${base}`, (row) => minus(row, k)],
        [`${columns[k]} most below ${base}`, (row) => (minus(row, k) === null ? null : -minus(row, k))],
      ]),
    ];
    const has = (test) => (row) => row.cells.some((cell) => cell && test(cell));
    const filters = [
      ["All prompts", () => true],
      ...numbered.flatMap((k) => [
        [`${columns[k]} better than ${base}`, (row) => minus(row, k) > 1e-9],
        [`${columns[k]} worse than ${base}`, (row) => minus(row, k) !== null && minus(row, k) < -1e-9],
      ]),
      ["With an answer cut off by the token limit", has((cell) => cell.finish_reason === "length")],
      ["With an answer without a score", has((cell) => cell.score === null)],
    ];
    for (const [id, options] of [["sort", orders], ["filter", filters]])
      at(id).append(...options.map(([name], k) => make("option", { value: k }, name)));
    const coloured = rows.some((row) => row.cells.some((cell) => cell && cell.logprobs));
    at("colour").disabled = !coloured;
    if (!coloured) at("colour").parentElement.title = "No log-probabilities were recorded.";

    let found = [], shown = 0;
    function text(cell) {
      if (!cell.pieces || !at("colour").checked) return isolated(cell.text);
      return make("bdi", {}, ...cell.pieces.map((piece, k) => {
        // From likely (green) to a surprisal of 8 nats or more (red).
        const surprise = Math.min(1, -cell.logprobs[k] / 8);
        const token = make("span", { class: "token", title: `log-probability ${number(cell.logprobs[k], 2)}` }, piece);
        token.style.backgroundColor = `hsl(${Math.round(130 - 130 * surprise)} 70% 80%)`;
        return token;
      }));
    }
    function shownCell(cell, k) {
      const own = make("div", { class: `cell s${k % 8}` }, make("h4", {}, isolated(columns[k])));
      if (!cell) { own.append(make("p", { class: "figures" }, "no answer yet")); return own; }
      const parts = Object.entries(cell.parts || {}).map(([name, value]) => `${name} ${number(value)}`);
      const rest = [];
      if (cell.gold !== undefined) rest.push(`gold ${number(cell.gold)}`);
      if (parts.length > 1) rest.push(parts.join(", "));
      if (cell.response_tokens !== undefined) rest.push(`${cell.response_tokens} tokens`);
      if (cell.finish_reason) rest.push(cell.finish_reason);
      const figures = make("p", { class: "figures" },
        make("span", { class: "score" }, cell.score === null ? "no score" : number(cell.score)),
        rest.length ? " · " : "", isolated(rest.join(" · ")));
      own.append(figures, make("p", { class: "text" }, text(cell)));
      if (cell.error) own.append(make("p", { class: "error" }, isolated(cell.error)));
      return own;
    }
    function more() {
      const next = found.slice(shown, shown + page);
      shown += next.length;
      at("rows").append(...next.map((row) => make("article", { tabindex: "0", "aria-label": `Prompt ${row.id}` },
        make("h3", {}, isolated(row.prompt)), make("p", { class: "note" }, isolated(row.id)),
        make("div", { class: "cells" }, ...row.cells.map(shownCell)))));
      at("more").hidden = shown >= found.length;
      at("count").textContent = `${found.length} of ${rows.length} prompts, ${shown} shown`;
    }
    function update() {
      const sought = at("find").value.toLowerCase();
      const [, keep] = filters[at("filter").value || 0], [, rank] = orders[at("sort").value || 0];
      found = rows.filter((row) => keep(row) && row.all.includes(sought));
      const low = (row) => { const value = rank(row); return value === null ? -Infinity : value; };
      found.sort((a, b) => low(b) - low(a) || a.place - b.place);
      at("rows").replaceChildren();
      shown = 0;
      more();
    }
    for (const id of ["find", "sort", "filter", "colour"]) at(id).addEventListener("input", update);
    document.querySelector("#answers form").addEventListener("submit", (event) => event.preventDefault());
    at("more").addEventListener("click", more);
    if ("IntersectionObserver" in window)
      new IntersectionObserver((seen) => { if (seen[0].isIntersecting && !at("more").hidden) more(); },
        { rootMargin: "600px" }).observe(at("more"));
    document.addEventListener("keydown", (event) => {
      const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "Escape" && event.target === at("find")) at("find").blur();
      if (typing) return;
      if (event.key === "/") { event.preventDefault(); at("find").focus(); }
      if (event.key === "j" || event.key === "k") {
        const all = [...at("rows").children], here = all.indexOf(document.activeElement);
        const next = event.key === "j" ? here + 1 : Math.max(0, here - 1);
        if (next >= all.length) more();
        const there = at("rows").children[next];
        if (there) { there.focus(); there.scrollIntoView({ block: "nearest" }); }
      }
    });
    update();
  }

  function search({ nodes, chosen, prompt, prefix }) {
    const below = nodes.map(() => []);
    for (const node of nodes.slice(1)) below[node.parent].push(node.index);
    const open = new Set(), onPath = new Set([0]);
    const openPath = () => { for (const node of nodes) if (node.chosen) { open.add(node.index); onPath.add(node.index); } };
    let selected = chosen === null ? 0 : chosen, time = nodes.length - 1;
    const worth = (node) => {
      if (node.score !== null) return `score ${number(node.score)}`;
      if (node.value === null) return "";
      return `value ${number(node.value)}` + (node.std ? ` ± ${number(node.std)}` : "");
    };
    const mostOpen = 300;
    if (nodes.length <= mostOpen) for (const node of nodes) open.add(node.index);
    open.add(0); openPath();

    function response(index) {
      const texts = [];
      for (let k = index; k !== null; k = nodes[k].parent) texts.unshift(nodes[k].text);
      return prefix + texts.join("");
    }
    const columns = [
      ["chunk", (n) => isolated(n.text || "(empty)")], ["value", (n) => n.value === null ? "-" : number(n.value) + (n.std ? ` ± ${number(n.std)}` : "")],
      ["bound", (n) => number(n.bound)], ["score", (n) => number(n.score)], ["visits", (n) => String(n.visits)], ["mean", (n) => number(n.mean)],
      ["log-prob.", (n) => number(n.logprob, 2)], ["drawn", (n) => `${n.copies}×`], ["why", (n) => isolated(n.note || "")],
    ].filter(([name]) => name !== "bound" || nodes.some((n) => n.bound !== undefined && n.bound !== null));
    // `WorldModelEstimate`, with its `QUANTILES`.
    function imagined({ value, details }) {
      const quantiles = [10, 25, 50, 75, 90].map((percent, k) => [`${percent}% quantile`, details.quantiles[k]]);
      const shown = [["mean reward", value], ...quantiles, ["epistemic std", details.epistemic], ["aleatoric std", details.aleatoric]];
      return [make("h3", {}, `${details.num_futures} imagined futures`),
        make("dl", {}, ...shown.flatMap(([name, x]) => [make("dt", {}, name), make("dd", {}, number(x))]))];
    }
    function details() {
      const node = nodes[selected], children = below[selected].filter((k) => k <= time);
      const facts = columns.slice(1).map(([name, show]) => [make("dt", {}, name), make("dd", {}, show(node))]).flat();
      const parts = Object.entries(node.parts).map(([name, value]) => [make("dt", {}, isolated(name)), make("dd", {}, number(value))]).flat();
      const body = children.map((k) => {
        const row = make("tr", {}, ...columns.map(([name, show]) =>
          make("td", /chunk|why/.test(name) ? { class: "text" } : { class: "number" }, show(nodes[k]))));
        if (nodes[k].chosen) row.style.fontWeight = "700";
        return row;
      });
      const futures = node.details && node.details.num_futures ? imagined(node) : [];
      at("node").replaceChildren(
        make("h3", {}, `Node ${selected}` + (node.chosen ? ", chosen" : "") + (node.finish_reason ? `, ended (${node.finish_reason})` : "")),
        make("p", { class: "note" }, isolated(prompt)), make("p", { class: "text" }, isolated(response(selected))),
        make("dl", {}, ...facts, ...parts), ...futures);
      if (children.length)
        at("node").append(make("h3", {}, `Its ${children.length} candidates`),
          make("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Candidates" }, make("table", {}, make("thead", {}, make("tr", {},
            ...columns.map(([name]) => make("th", { scope: "col" }, name)))), make("tbody", {}, ...body))));
    }
    function visible() {
      const found = [], stack = [0];
      while (stack.length) {
        const index = stack.pop();
        if (index > time) continue;
        found.push(index);
        if (open.has(index)) stack.push(...[...below[index]].reverse());
      }
      return found;
    }
    function draw(focus) {
      at("tree").replaceChildren(...visible().map((index) => {
        const node = nodes[index], children = below[index].filter((k) => k <= time);
        const attributes = { role: "treeitem", "aria-level": node.depth + 1, "aria-selected": index === selected, tabindex: index === selected ? 0 : -1, "data-node": index };
        if (children.length) attributes["aria-expanded"] = open.has(index);
        if (index === time && time < nodes.length - 1) attributes.class = "newest";
        const mark = children.length ? (open.has(index) ? "▾" : `▸ ${children.length}`) : "·";
        const item = make("li", attributes, make("span", { "aria-hidden": true }, mark), make("span", { class: "worth" }, worth(node)),
          make("span", { class: node.chosen ? "chunk chosen" : "chunk" }, isolated((index ? node.text : prompt).replace(/\s+/g, " "))),
          make("span", { class: "why" }, isolated([node.visits ? `${node.visits} visits` : "", node.note].filter(Boolean).join(", "))));
        item.style.setProperty("--depth", node.depth);
        return item;
      }));
      details();
      at("time").value = time;
      at("now").textContent = `${time} of ${nodes.length - 1}`;
      at("back").disabled = time === 0;
      at("forth").disabled = time === nodes.length - 1;
      const here = at("tree").querySelector("[aria-selected=true]");
      if (here && focus) here.focus();
      else if (here) at("tree").scrollTop = Math.max(0, here.offsetTop - at("tree").clientHeight / 2);
    }
    function select(index, focus = true) {
      selected = index;
      for (let k = nodes[index].parent; k !== null; k = nodes[k].parent) open.add(k);
      draw(focus);
    }
    function step(to) {
      time = Math.max(0, Math.min(nodes.length - 1, to));
      select(time, false);
    }
    at("time").max = nodes.length - 1;
    at("time").addEventListener("input", () => step(Number(at("time").value)));
    at("back").addEventListener("click", () => step(time - 1));
    at("forth").addEventListener("click", () => step(time + 1));
    at("path").addEventListener("click", () => { open.clear(); openPath(); time = nodes.length - 1; select(chosen === null ? 0 : chosen, false); });
    at("all").addEventListener("click", () => { for (const node of nodes) open.add(node.index); draw(false); });
    at("tree").addEventListener("click", (event) => {
      const item = event.target.closest("li");
      if (!item) return;
      const index = Number(item.dataset.node);
      if (index === selected) { if (open.has(index)) open.delete(index); else open.add(index); }
      select(index);
    });
    at("tree").addEventListener("keydown", (event) => {
      const list = visible(), here = list.indexOf(selected), children = below[selected].filter((k) => k <= time);
      const moves = {
        ArrowDown: () => list[here + 1], ArrowUp: () => list[here - 1], Home: () => list[0], End: () => list[list.length - 1],
        ArrowRight: () => { if (children.length && open.has(selected)) return children[0]; open.add(selected); return selected; },
        ArrowLeft: () => { if (children.length && open.has(selected)) { open.delete(selected); return selected; } return nodes[selected].parent; },
      };
      const move = moves[event.key];
      if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      const next = move();
      if (next !== undefined && next !== null) select(next);
    });
    draw(false);
  }

  if (data.answers) answers(data.answers);
  if (data.search) search(data.search);
})();
