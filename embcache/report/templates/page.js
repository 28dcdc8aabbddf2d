// The page's own script: draws the charts that Bokeh describes, and keeps legends, tooltips, the map and its search.
// Every value from a file reaches the page as text (textContent), never as HTML.
(() => {
  "use strict";
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const tip = document.getElementById("tip");
  const plots = new Map();

  const make = (tag, text, className) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (className) element.className = className;
    return element;
  };
  const number = (value, digits) => value.toLocaleString("en", {minimumFractionDigits: digits, maximumFractionDigits: digits});

  // Theme: the system's, unless the button says otherwise.
  const system = matchMedia("(prefers-color-scheme: dark)");
  const themeButton = document.getElementById("theme");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const paint = (figure, dark) => {
    const ink = dark ? "#e4e8ed" : "#1b2027", line = dark ? "#343c46" : "#d5dbe1", dim = dark ? "#a3adb9" : "#55606d";
    figure.outline_line_color = line;
    for (const axis of [...figure.below, ...figure.left]) {
      axis.setv({axis_label_text_color: ink, axis_label_text_font_style: "normal", major_label_text_color: dim,
                 axis_line_color: dim, major_tick_line_color: dim, minor_tick_line_color: line});
    }
    for (const grid of figure.center) if ("grid_line_color" in grid) grid.grid_line_color = line;
  };
  const retheme = (dark = isDark()) => {
    themeButton.setAttribute("aria-pressed", String(dark));
    for (const {figure} of plots.values()) paint(figure, dark);
  };
  themeButton.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    retheme();
  });
  system.addEventListener("change", () => retheme());
  // On paper each chart is a still picture in light colors, as wide as the sheet: Bokeh would repaint too late.
  addEventListener("beforeprint", () => {
    for (const [id, {figure, view}] of plots) {
      const plot = document.getElementById(id);
      if (!plot.clientWidth || plot.closest("details:not([open])")) continue;
      paint(figure, false);
      view.repaint();
      const still = view.export("png").canvas;
      still.className = "still";
      plot.append(still);
      plot.classList.add("printed");
    }
  });
  addEventListener("afterprint", () => {
    for (const still of all(".still")) {
      still.parentElement.classList.remove("printed");
      still.remove();
    }
    retheme();
  });

  // A table that is wider than its box says so, until it has been scrolled.
  for (const box of all(".scroll")) {
    const hint = box.previousElementSibling;
    const tell = () => {
      const more = box.scrollWidth > box.clientWidth + 1 && box.scrollLeft + box.clientWidth < box.scrollWidth - 1;
      box.classList.toggle("more", more);
      if (hint?.classList.contains("hint")) hint.hidden = !(more && box.scrollLeft === 0);
    };
    new ResizeObserver(tell).observe(box);
    box.addEventListener("scroll", tell, {passive: true});
  }

  const opener = document.getElementById("open-all");
  opener.addEventListener("click", () => {
    const open = opener.getAttribute("aria-pressed") !== "true";
    opener.setAttribute("aria-pressed", String(open));
    opener.textContent = open ? "Close all" : "Open all";
    for (const each of all("details")) each.open = open;
  });

  // The tooltip follows the pointer; it is filled by whatever lies under it.
  let pointer = [0, 0];
  const place = () => {
    const box = tip.getBoundingClientRect(), [x, y] = pointer;
    tip.style.left = `${Math.max(4, x + 16 + box.width > innerWidth ? x - box.width - 12 : x + 16)}px`;
    tip.style.top = `${Math.max(4, Math.min(y + 16, innerHeight - box.height - 4))}px`;
  };
  const showTip = (...children) => {
    tip.replaceChildren(...children);
    tip.hidden = false;
    place();
  };
  const hideTip = () => { tip.hidden = true; };
  addEventListener("pointermove", (event) => {
    pointer = [event.clientX, event.clientY];
    if (!tip.hidden) {
      if (event.target instanceof Element && event.target.closest(".plot")) place(); else hideTip();
    }
  }, {passive: true, capture: true});
  addEventListener("scroll", hideTip, {passive: true});
  addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });

  const column = (source, name) => (source.data instanceof Map ? source.data.get(name) : source.data[name]);
  const named = (figure, name) => figure.renderers.filter((renderer) => renderer.name === name);

  const wireLegend = (chart, figure, toggled) => {
    for (const key of all(`[data-legend="${chart.id}"] .key`)) {
      key.addEventListener("click", () => {
        const shown = key.getAttribute("aria-pressed") !== "true";
        key.setAttribute("aria-pressed", String(shown));
        for (const renderer of named(figure, `s${key.dataset.series}`)) renderer.visible = shown;
        toggled(Number(key.dataset.series), shown);
      });
    }
  };

  const wireLines = (chart, figure) => {
    const under = new Map();
    for (const [place, series] of chart.series.entries()) {
      for (const renderer of named(figure, `s${place}`)) {
        const source = renderer.data_source;
        if (!column(source, "y")) continue; // a band
        source.inspect.connect(() => {
          const {indices, line_indices: lines} = source.inspected;
          const row = indices.length ? indices[0] : lines?.length ? lines[0] : -1;
          if (row < 0 || !renderer.visible) under.delete(place); else under.set(place, {series, source, row});
          if (!under.size) { hideTip(); return; }
          const rows = [...under.values()].slice(0, 6).map(({series, source, row}) => {
            const at = (name) => column(source, name)[row];
            const line = make("p");
            line.append(make("strong", series.name), make("span", ` ${chart.axes[0]} ${number(at("x"), chart.digits[0])}, ${chart.axes[1]} ${number(at("y"), chart.digits[1])}${column(source, "n") ? `, ${number(at("n"), 0)} images` : ""}`));
            return line;
          });
          showTip(...rows);
        });
      }
    }
    wireLegend(chart, figure, () => under.clear());
  };

  // The map of embeddings: points by class, filters, search, a card for the image that is picked.
  class EmbeddingMap {
    constructor(chart, figure) {
      this.chart = chart;
      this.figure = figure;
      this.data = data.maps[chart.id];
      this.section = document.querySelector(`section[data-map="${chart.id}"]`);
      this.count = this.data.labels.length;
      this.hidden = new Set();
      this.filter = {};
      this.picked = -1;
      this.which = this.section.querySelector(".which");
      this.by = this.section.querySelector(".by");
      this.right = this.section.querySelector(".right");
      this.find = this.section.querySelector(".find");
      this.card = this.section.querySelector(".card");
      this.status = this.section.querySelector(".status");
      this.matches = this.section.querySelector(".matches");
      this.wire();
      this.fit();
      this.fill();
    }
    xy(axis, k) { return this.data.maps[Number(this.which.value)].xy[axis][k]; }
    name(k) { return this.data.ids ? this.data.ids[k] : `point ${k + 1}`; }
    className(c) { return c < 0 ? "none" : this.data.classes[c]; }
    predicted(k) { return this.by ? this.data.predicted[Number(this.by.value)].label[k] : -1; }
    probability(k) { return this.data.predicted[Number(this.by.value)].p[k]; }
    kept(k) {
      const label = this.data.labels[k], guess = this.predicted(k), f = this.filter;
      if (f.label !== undefined && f.label !== label) return false;
      if (f.predicted !== undefined && f.predicted !== guess) return false;
      if (!this.right || this.right.value === "all") return true;
      return guess >= 0 && (guess === label) === (this.right.value === "right");
    }
    fit() {
      for (const [axis, range] of [this.figure.x_range, this.figure.y_range].entries()) {
        const values = this.data.maps[Number(this.which.value)].xy[axis];
        let low = Infinity, high = -Infinity;
        for (const v of values) { if (v < low) low = v; if (v > high) high = v; }
        const room = (high - low || 1) * 0.04;
        range.setv({start: low - room, end: high + room, reset_start: low - room, reset_end: high + room});
      }
    }
    fill() {
      const per = this.data.classes.map(() => ({x: [], y: [], k: []}));
      let kept = 0;
      for (let k = 0; k < this.count; k++) {
        if (!this.kept(k)) continue;
        const columns = per[this.data.labels[k]];
        columns.x.push(this.xy(0, k));
        columns.y.push(this.xy(1, k));
        columns.k.push(k);
        if (!this.hidden.has(this.data.labels[k])) kept += 1;
      }
      for (const [c, columns] of per.entries()) {
        const source = named(this.figure, `s${c}`)[0].data_source;
        source.selected.indices = [];
        source.data = columns;
      }
      this.ring();
      const f = this.filter, words = [];
      if (f.label !== undefined) words.push(`class ${this.className(f.label)}`);
      if (f.predicted !== undefined) words.push(`predicted as ${this.className(f.predicted)}`);
      if (this.right && this.right.value !== "all") words.push(`${this.right.value === "right" ? "correctly" : "wrongly"} predicted`);
      this.status.textContent = `${kept.toLocaleString("en")} of ${this.count.toLocaleString("en")} images shown${words.length ? ": " + words.join(", ") : ""}.`;
      this.section.dataset.shown = String(kept);
      for (const cell of all(`.cell[data-map="${this.chart.id}"]`)) {
        const on = Number(cell.dataset.true) === f.label && Number(cell.dataset.predicted) === f.predicted && this.by && cell.dataset.by === this.by.value;
        cell.setAttribute("aria-pressed", String(Boolean(on)));
      }
    }
    ring() {
      const k = this.picked;
      named(this.figure, "ring")[0].data_source.data = k < 0 ? {x: [], y: [], k: []} : {x: [this.xy(0, k)], y: [this.xy(1, k)], k: [k]};
    }
    thumb(k, most) {
      const t = this.data.thumbs, at = t ? t.place[k] : -1;
      if (at < 0) return null;
      const per = t.across * t.across, scale = Math.max(1, Math.floor(most / t.side)), side = t.side * scale;
      const row = Math.floor((at % per) / t.across), column = at % t.across;
      const box = make("span", undefined, "thumb");
      box.setAttribute("role", "img");
      box.setAttribute("aria-label", `Thumbnail of ${this.name(k)}`);
      box.style.width = box.style.height = `${side}px`;
      box.style.backgroundImage = `url("data:image/webp;base64,${t.sheets[Math.floor(at / per)]}")`;
      box.style.backgroundSize = `${side * t.across}px auto`;
      box.style.backgroundPosition = `${-column * side}px ${-row * side}px`;
      return box;
    }
    facts(k) {
      const rows = [[this.data.ids ? "ID" : "number", this.data.ids ? this.name(k) : String(k + 1)], [this.data.noun, this.className(this.data.labels[k])]];
      if (this.by) {
        const guess = this.predicted(k);
        rows.push(["predicted", guess < 0 ? "not in the test set" : `${this.className(guess)} (${number(this.probability(k), 2)})`]);
      }
      return rows;
    }
    hover(k) {
      const parts = this.facts(k).map(([key, value]) => {
        const line = make("p");
        line.append(make("span", `${key}: `), make("strong", value));
        return line;
      });
      const picture = this.thumb(k, 128);
      showTip(...(picture ? [picture] : []), ...parts);
    }
    pick(k) {
      this.picked = k;
      this.ring();
      const list = make("dl");
      for (const [key, value] of this.facts(k)) list.append(make("dt", key), make("dd", value));
      const acts = make("div", undefined, "acts"), label = this.data.labels[k], guess = this.predicted(k);
      const act = (words, change) => {
        const button = make("button", words);
        button.type = "button";
        button.addEventListener("click", change);
        acts.append(button);
      };
      act("Only this class", () => this.narrow({label}));
      if (guess >= 0) {
        act("Only this prediction", () => this.narrow({predicted: guess}));
        act("Only this pair", () => this.narrow({label, predicted: guess}));
      }
      act("Previous", () => this.step(-1));
      act("Next", () => this.step(1));
      const picture = this.thumb(k, 160);
      this.card.replaceChildren(...(picture ? [picture] : []), list, acts);
    }
    step(by) {
      for (let i = 1; i <= this.count; i++) {
        const k = (((this.picked + by * i) % this.count) + this.count) % this.count;
        if (this.kept(k) && !this.hidden.has(this.data.labels[k])) {
          this.pick(k);
          all("button", this.card).at(by < 0 ? -2 : -1).focus();
          return;
        }
      }
    }
    narrow(filter) {
      this.filter = filter;
      this.fill();
    }
    search() {
      const text = this.find.value.trim().toLowerCase();
      this.matches.replaceChildren();
      if (!text) { this.fill(); return; }
      const found = [];
      let total = 0;
      for (let k = 0; k < this.count; k++) {
        const fits = this.data.ids ? this.data.ids[k].toLowerCase().includes(text) : String(k + 1) === text.replace(/^point\s*/, "");
        if (!fits) continue;
        total += 1;
        if (found.length < 20) found.push(k);
      }
      for (const k of found) {
        const item = make("li"), button = make("button", this.name(k));
        button.type = "button";
        button.addEventListener("click", () => this.pick(k));
        item.append(button);
        this.matches.append(item);
      }
      this.status.textContent = `${total.toLocaleString("en")} ${total === 1 ? "image matches" : "images match"}${total > found.length ? `, the first ${found.length} are listed` : ""}.`;
      if (total === 1) this.pick(found[0]);
    }
    wire() {
      for (const c of this.data.classes.keys()) {
        const renderer = named(this.figure, `s${c}`)[0], source = renderer.data_source;
        const k = (row) => column(source, "k")[row];
        source.inspect.connect(() => {
          const {indices} = source.inspected;
          if (indices.length) { this.under = c; this.hover(k(indices[0])); }
          else if (this.under === c) { this.under = undefined; hideTip(); }
        });
        source.selected.properties.indices.change.connect(() => {
          const {indices} = source.selected;
          if (indices.length) this.pick(k(indices[0]));
        });
      }
      wireLegend(this.chart, this.figure, (c, shown) => {
        if (shown) this.hidden.delete(c); else this.hidden.add(c);
        this.fill();
      });
      this.which.addEventListener("change", () => { this.fit(); this.fill(); });
      for (const select of [this.by, this.right]) {
        select?.addEventListener("change", () => { this.fill(); if (this.picked >= 0) this.pick(this.picked); });
      }
      this.find.addEventListener("input", () => this.search());
      this.find.addEventListener("keydown", (event) => {
        if (event.key === "Enter") this.matches.querySelector("button")?.click();
      });
      this.section.querySelector(".clear").addEventListener("click", () => {
        this.filter = {};
        this.hidden.clear();
        if (this.right) this.right.value = "all";
        this.find.value = "";
        this.matches.replaceChildren();
        for (const key of all(".key", this.section)) {
          key.setAttribute("aria-pressed", "true");
          for (const renderer of named(this.figure, `s${key.dataset.series}`)) renderer.visible = true;
        }
        this.fill();
      });
      for (const cell of all(`.cell[data-map="${this.chart.id}"]`)) {
        cell.addEventListener("click", () => {
          this.by.value = cell.dataset.by;
          this.right.value = "all";
          this.narrow({label: Number(cell.dataset.true), predicted: Number(cell.dataset.predicted)});
          this.section.scrollIntoView();
          this.find.focus({preventScroll: true});
        });
      }
    }
  }

  const draw = async () => {
    for (const chart of data.charts) {
      const manager = await Bokeh.embed.embed_item(chart.item, chart.id);
      const view = manager.roots ? [...manager.roots][0] : manager, figure = view.model;
      plots.set(chart.id, {figure, view});
      paint(figure, isDark());
      if (chart.kind === "map") plots.get(chart.id).map = new EmbeddingMap(chart, figure); else wireLines(chart, figure);
      // Let the page answer between two charts.
      await new Promise((resolve) => setTimeout(resolve));
    }
    retheme();
    root.dataset.drawn = String(Math.round(performance.now()));
  };
  draw().catch((error) => { root.dataset.failed = String(error); console.error(error); });
})();
