"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const root = document.documentElement;

  // Theme: follows the system until the reader chooses; storage may be refused for files, which is fine.
  const themeButton = byId("theme");
  const systemDark = window.matchMedia("(prefers-color-scheme: dark)");
  const stored = () => { try { return localStorage.getItem("crossray-theme"); } catch { return null; } };
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
  const showTheme = () => {
    themeButton.textContent = isDark() ? "Light mode" : "Dark mode";
    themeButton.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
  };
  if (stored() === "light" || stored() === "dark") root.dataset.theme = stored();
  themeButton.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("crossray-theme", root.dataset.theme); } catch { /* not kept */ }
    showTheme();
  });
  systemDark.addEventListener("change", showTheme);
  showTheme();

  // A link to a card inside a closed block opens the block; printing opens all of them.
  const reveal = () => {
    const target = location.hash.length > 1 ? byId(decodeURIComponent(location.hash.slice(1))) : null;
    if (!target) return;
    let hidden = false;
    for (let node = target.parentElement; node; node = node.parentElement) {
      if (node.tagName === "DETAILS" && !node.open) { node.open = true; hidden = true; }
    }
    if (hidden) target.scrollIntoView();
  };
  window.addEventListener("hashchange", reveal);
  reveal();
  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const block of opened) block.open = true;
  });
  window.addEventListener("afterprint", () => { for (const block of opened) block.open = false; });

  // Figures. Colours are CSS variables, so both themes and print need no second drawing. Expressions are interpreted
  // (ast), since the page's security policy allows no evaluation of text. Parts of a column of charts get their width
  // here, since Vega-Lite fits only single charts to their container.
  let openLatent = () => {};
  const figures = JSON.parse(byId("figure-data").textContent);
  const draw = async (node) => {
    const spec = figures.specs[node.dataset.figure];
    if (spec.vconcat) {
      for (const part of spec.vconcat) part.width = Math.max(200, node.clientWidth - 56);
    } else {
      spec.width = "container";
      spec.autosize = { type: "fit-x", contains: "padding" };
    }
    const config = { ...figures.config, legend: { ...figures.config.legend, columns: node.clientWidth < 420 ? 2 : 3 } };
    const { view } = await vegaEmbed(node, spec, {
      config, mode: "vega-lite", renderer: "svg", ast: true, actions: false, defaultStyle: false,
      tooltip: { disableDefaultStyle: true },
    });
    view.addEventListener("click", (event, item) => { if (item?.datum?.card) openLatent(item.datum.card); });
  };
  const drawAll = async () => {
    for (const node of document.querySelectorAll(".chart[data-figure]")) await draw(node);
    root.dataset.figures = "drawn";
    reveal();
  };
  drawAll();

  // Latent table. A row is [crosscoder, verdict, confident, card, behaviours, intervals, explanation, ...values].
  const table = byId("latent-table");
  if (!table) return;
  const PAGE = 200;
  const FIRST = 7;
  const [CROSSCODER, VERDICT, SURE, CARD, BEHAVIOURS, INTERVALS, WORDS] = [0, 1, 2, 3, 4, 5, 6];
  const data = JSON.parse(byId("latent-data").textContent);
  const hasWords = data.rows.some((row) => row[WORDS]);
  const columns = data.columns.map((column, index) => ({ ...column, index: FIRST + index }))
    .filter((column) => column.key !== "explained" || hasWords);
  const LATENT = columns[0].index;
  const heads = [
    { label: "crosscoder", title: "", index: CROSSCODER },
    { label: "verdict", title: "", index: VERDICT },
    { label: "sure", title: "both intervals on one side of their thresholds", index: SURE },
    columns[0],
    { label: "behaviour", title: "planted behaviour that it finds best or was steered for", index: BEHAVIOURS },
    ...columns.slice(1),
    ...(hasWords ? [{ label: "in words", title: "what a language model says that it stands for", index: WORDS }] : []),
  ];
  const state = { sort: null, descending: false, shown: PAGE };

  const make = (tag, text, attributes = {}) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };
  const percents = new Set(["template_frac", "user_frac", "assistant_frac", "artifact_probability"]);
  const formats = {
    latent: (v) => String(v),
    frequency: (v) => `${(100 * v).toPrecision(2)}%`,
    max_activation: (v) => v.toPrecision(3),
    delta_norm: (v) => v.toFixed(3),
  };
  const written = (key, value) => {
    if (value === null) return "\u2013";
    if (percents.has(key)) return `${Math.round(100 * value)}%`;
    return (formats[key] || ((v) => v.toFixed(2)))(value);
  };

  // Cards that do not stand on the page wait in templates; those that do are copied.
  const cardNode = (anchor) => {
    const source = byId(anchor) ?? document.querySelector(`template[data-card="${anchor}"]`).content.querySelector(".card");
    const copy = source.cloneNode(true);
    copy.removeAttribute("id");
    for (const block of copy.querySelectorAll("details")) block.open = true;
    return copy;
  };
  const toggleCard = (button, node, anchor) => {
    const isOpen = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", String(!isOpen));
    if (isOpen) { node.nextElementSibling.remove(); return; }
    const below = make("tr", undefined, { class: "opened" });
    const cell = make("td", undefined, { colspan: String(heads.length) });
    cell.append(cardNode(anchor));
    below.append(cell);
    node.after(below);
  };

  const headRow = make("tr");
  for (const head of heads) {
    const cell = make("th", undefined, { scope: "col", class: head.key ? "num" : "" });
    const button = make("button", head.label, { type: "button", title: head.title });
    button.addEventListener("click", () => {
      // A new column starts with the direction that puts the telling end first; a second click turns it round.
      state.descending = state.sort === head.index ? !state.descending : Boolean(head.key) && head.key !== "latent"
        && !head.key.startsWith("nu_") && head.key !== "artifact_probability";
      state.sort = head.index;
      state.shown = PAGE;
      for (const other of headRow.children) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
      show();
    });
    cell.append(button);
    headRow.append(cell);
  }
  table.tHead.append(headRow);

  const verdictSelect = byId("f-verdict");
  const present = new Set(data.rows.map((row) => row[VERDICT]));
  data.verdicts.forEach((verdict, index) => {
    if (present.has(index)) verdictSelect.append(make("option", verdict.name, { value: String(index) }));
  });

  const sortValue = (row) => {
    if (state.sort === BEHAVIOURS) return row[BEHAVIOURS].join(", ") || null;
    if (state.sort === SURE) return -row[SURE];
    if (state.sort === WORDS) return row[WORDS] || null;
    return row[state.sort];
  };
  const compare = (one, two) => {
    const a = sortValue(one), b = sortValue(two);
    if (a === null || b === null) return (a === null) - (b === null);
    const order = typeof a === "string" ? a.localeCompare(b) : a - b;
    return state.descending ? -order : order;
  };

  const rowNode = (row) => {
    const node = make("tr");
    node.append(make("td", data.crosscoders[row[CROSSCODER]]));
    const verdict = make("td");
    verdict.append(make("span", data.verdicts[row[VERDICT]].name,
      { class: "badge", style: `--c:var(--${data.verdicts[row[VERDICT]].role})` }));
    node.append(verdict, make("td", row[SURE] ? "yes" : "\u2013"));
    for (const column of columns) {
      const cell = make("td", undefined, { class: "num" });
      const text = written(column.key, row[column.index]);
      if (column.key === "latent" && row[CARD]) {
        const button = make("button", text, { type: "button", class: "open", "aria-expanded": "false", title: "open its card" });
        button.addEventListener("click", () => toggleCard(button, node, row[CARD]));
        cell.append(button);
      } else cell.textContent = text;
      const at = column.key === "nu_eps" ? 0 : column.key === "nu_r" ? 2 : -1;
      const ends = row[INTERVALS];
      if (at >= 0 && ends[at] !== null && ends[at + 1] !== null) {
        cell.title = `95% interval ${ends[at].toFixed(2)} to ${ends[at + 1].toFixed(2)}`;
      }
      node.append(cell);
      if (column.index === LATENT) node.append(make("td", row[BEHAVIOURS].join(", ")));
    }
    if (hasWords) node.append(make("td", row[WORDS], { class: "in-words", title: row[WORDS] }));
    return node;
  };

  // The search: words must all occur, conditions like nu_r<0.3 or template>50% must all hold, a number is a latent.
  const tests = { "<": (a, b) => a < b, "<=": (a, b) => a <= b, ">": (a, b) => a > b, ">=": (a, b) => a >= b, "=": (a, b) => a === b };
  const conditionOf = (word) => {
    const found = /^([a-z_]+)(<=|>=|<|>|=)(-?[\d.]+)(%?)$/.exec(word);
    if (!found) return null;
    const name = (text) => text.toLowerCase().startsWith(found[1]);
    const column = columns.find((one) => name(one.key) || name(one.label));
    if (!column) return null;
    const value = Number(found[3]) / (found[4] ? 100 : 1);
    return (row) => row[column.index] !== null && tests[found[2]](row[column.index], value);
  };
  const searchOf = (text) => text.split(/\s+/).filter(Boolean).map((word) => {
    if (/^\d+$/.test(word)) return (row) => String(row[LATENT]) === word;
    return conditionOf(word) || ((row) => row[WORDS].toLowerCase().includes(word)
      || row[BEHAVIOURS].some((name) => name.toLowerCase().includes(word)));
  });

  const show = () => {
    const crosscoder = byId("f-crosscoder").value, verdict = verdictSelect.value;
    const confident = byId("f-confident").checked, withCards = byId("f-cards").checked;
    const search = searchOf(byId("f-text").value.trim().toLowerCase());
    const matching = data.rows.filter((row) =>
      (crosscoder === "" || row[CROSSCODER] === Number(crosscoder)) &&
      (verdict === "" || row[VERDICT] === Number(verdict)) &&
      (!confident || row[SURE]) && (!withCards || row[CARD]) &&
      search.every((test) => test(row)));
    if (state.sort !== null) matching.sort(compare);
    table.tBodies[0].replaceChildren(...matching.slice(0, state.shown).map(rowNode));
    const shown = Math.min(matching.length, state.shown);
    byId("f-count").textContent = `${shown.toLocaleString("en-US")} of ${matching.length.toLocaleString("en-US")} shown`;
    byId("f-more").hidden = matching.length <= state.shown;
  };
  const restart = () => { state.shown = PAGE; show(); };
  // A latent in a figure opens its card: where it stands on the page, else from its row of the table.
  openLatent = (anchor) => {
    if (byId(anchor)) {
      if (location.hash === `#${anchor}`) byId(anchor).scrollIntoView();
      location.hash = anchor;
      return;
    }
    const [, place, latent] = anchor.split("-");
    byId("filters").reset();
    byId("f-crosscoder").value = place;
    byId("f-text").value = latent;
    restart();
    table.tBodies[0].querySelector("button.open")?.click();
    byId("table").scrollIntoView();
  };
  // The filters stand in the address, so that a reader can pass on what they show.
  const filters = ["crosscoder", "verdict", "text", "confident", "cards"];
  const valueOf = (field) => {
    if (field.type === "checkbox") return field.checked ? "yes" : "";
    return field.options && field.value !== "" ? field.selectedOptions[0].text : field.value;
  };
  const toAddress = () => {
    const set = filters.map((name) => [name, valueOf(byId(`f-${name}`))]).filter(([, value]) => value);
    history.replaceState(null, "", set.length ? `#table?${new URLSearchParams(set)}` : "#table");
  };
  const fromAddress = () => {
    if (!location.hash.startsWith("#table?")) return;
    const given = new URLSearchParams(location.hash.slice("#table?".length));
    for (const name of filters) {
      const field = byId(`f-${name}`), value = given.get(name) ?? "";
      if (field.type === "checkbox") field.checked = value === "yes";
      else if (field.options) field.value = [...field.options].find((own) => value && own.text === value)?.value ?? "";
      else field.value = value;
    }
    restart();
    byId("table").scrollIntoView();
  };
  window.addEventListener("hashchange", fromAddress);
  byId("filters").addEventListener("input", () => { restart(); toAddress(); });
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("f-more").addEventListener("click", () => { state.shown += PAGE; show(); });
  show();
  fromAddress();
})();
