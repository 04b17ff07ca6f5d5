// Brings the pieces that sae_lib/components.py writes to life. The script stands in each of them and starts those that are new.
(() => {
  const start = {
    // Shows the outcome of the chosen rule at the chosen level; the outcomes were computed in Python.
    selection(root, data) {
      const find = (selector) => root.querySelector(selector);
      const form = find("form"), slider = find("[type=range]");
      const pairs = root.querySelectorAll("td.pair");
      const rows = root.querySelectorAll("tbody .count"), columns = root.querySelectorAll("tfoot .count");
      const chosen = () => Number(find("[name=rule]:checked").value);
      let now = chosen();
      const level = data.rules.map((rule, i) => (i === now ? Number(slider.value) : Math.min(1, rule.states.length - 1)));

      const show = () => {
        const rule = data.rules[now], state = rule.states[level[now]];
        find(".who").textContent = rule.who;
        find(".knob").hidden = !rule.knob;
        find(".knob span").textContent = rule.knob;
        find("output").textContent = state.level;
        slider.max = rule.states.length - 1;
        slider.value = level[now];
        slider.setAttribute("aria-valuetext", state.level);
        pairs.forEach((pair, i) => {
          const alive = state.alive[i] === "1";
          pair.classList.toggle("alive", alive);
          pair.querySelector(".unseen span").textContent = alive ? "lives" : "";
        });
        rows.forEach((cell, i) => { cell.textContent = state.rows[i]; });
        columns.forEach((cell, j) => { cell.textContent = state.columns[j]; });
        find(".said").textContent = state.said;
      };

      form.addEventListener("submit", (event) => event.preventDefault());
      form.addEventListener("input", (event) => {
        if (event.target === slider) level[now] = Number(slider.value);
        else now = chosen();
        show();
      });
    },

    // Shows the figure that belongs to the slider's position.
    slider(root, data) {
      const knob = root.querySelector("[type=range]"), images = root.querySelectorAll("img");
      knob.addEventListener("input", () => {
        const now = Number(knob.value), position = data.positions[now];
        images.forEach((image, i) => { image.hidden = i !== now; });
        knob.setAttribute("aria-valuetext", position);
        root.querySelector("output").textContent = position;
      });
    },

    // Turns the chosen image; its strips were drawn in Python.
    turning(root, data) {
      const form = root.querySelector("form"), knob = root.querySelector("[type=range]");
      const picture = root.querySelector(".turned"), strips = [...root.querySelectorAll("figure")];
      const show = () => {
        const image = Number(root.querySelector("[name=image]:checked").value), pose = Number(knob.value);
        const angle = data.angles[pose], told = [`${data.names[image]}, turned by ${angle}`];
        picture.src = data.sources[image][pose];
        picture.alt = told[0];
        root.querySelector("output").textContent = angle;
        knob.setAttribute("aria-valuetext", angle);
        strips.forEach((strip, i) => {
          const state = data.strips[image][i][pose];
          for (const path of strip.querySelectorAll("path")) path.setAttribute("d", state[path.getAttribute("class")]);
          strip.querySelector(".said").textContent = state.said;
          told.push(strip.querySelector("figcaption").textContent);
        });
        root.querySelector("[role=status]").textContent = told.join(". ");
      };
      form.addEventListener("submit", (event) => event.preventDefault());
      form.addEventListener("input", show);
    },

    // Shows the claims of the chosen paper and verdict.
    ledger(root) {
      const form = root.querySelector("form"), said = root.querySelector(".said");
      const bodies = [...root.querySelectorAll("tbody")], claims = [...root.querySelectorAll("[data-verdict]")];
      const show = () => {
        const verdict = root.querySelector("[name=verdict]:checked").value, paper = form.elements.paper.value;
        for (const body of bodies) {
          const wanted = !paper || body.dataset.paper === paper;
          const rows = [...body.querySelectorAll("[data-verdict]")];
          for (const row of rows) row.hidden = !wanted || (verdict && row.dataset.verdict !== verdict);
          body.hidden = rows.every((row) => row.hidden);
        }
        const shown = claims.filter((row) => !row.hidden).length;
        said.textContent = `${shown} of ${claims.length} claims are shown.`;
      };
      // A link to a claim shows it, whatever was chosen.
      const follow = () => {
        const row = location.hash.startsWith("#claim-") && root.querySelector(`[id="${CSS.escape(location.hash.slice(1))}"]`);
        if (!row || !row.hidden) return;
        form.reset();
        show();
        row.scrollIntoView();
      };
      form.addEventListener("submit", (event) => event.preventDefault());
      form.addEventListener("input", show);
      addEventListener("hashchange", follow);
      show(); // the browser may have kept what was chosen before
    },

    // Arrow keys and taps move from token to token and tell each one's value.
    text(root, data) {
      const said = root.querySelector("[role=status]");
      for (const text of root.querySelectorAll(".text")) {
        const words = [...text.children];
        const sizes = words.map((word) => Math.abs(Number(word.dataset.value)));
        let here = Math.max(0, sizes.indexOf(Math.max(...sizes)));
        const leave = () => words[here]?.classList.remove("here");
        const go = (to) => {
          leave();
          here = Math.min(Math.max(to, 0), words.length - 1);
          words[here].classList.add("here");
          said.textContent = `${words[here].textContent}: ${data.label} ${words[here].dataset.value}`;
        };
        text.addEventListener("focus", () => go(here));
        text.addEventListener("blur", leave);
        text.addEventListener("click", (event) => {
          if (words.includes(event.target)) go(words.indexOf(event.target));
        });
        text.addEventListener("keydown", (event) => {
          const to = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: words.length - 1 }[event.key];
          if (to === undefined) return;
          go(to);
          event.preventDefault();
        });
      }
    },
  };

  for (const root of document.querySelectorAll(".sae-piece:not([data-ready])")) {
    const data = root.querySelector('script[type="application/json"]');
    if (!data) continue; // still being read by the browser; its own script comes after its data
    root.dataset.ready = "";
    start[root.dataset.kind](root, JSON.parse(data.textContent));
  }
})();
