// One panel of settings: the sampler, its options, and what else a request may say.

const NUMBERS = ["max_tokens", "block_length", "temperature", "top_p", "seed"];

function elementOf(id) {
  return document.getElementById(id).content.firstElementChild.cloneNode(true);
}

// The number in a field, null in an empty one.
function number(field) {
  const name = field.closest("label").firstChild.textContent.trim();
  if (field.validity.badInput) throw new Error(`${name}: this is not a number.`);
  return field.value === "" ? null : field.valueAsNumber;
}

function optionField(name, value) {
  const field = document.createElement("input");
  const label = document.createElement("label");
  if (typeof value === "boolean") {
    Object.assign(field, { type: "checkbox", checked: value });
    label.className = "tick";
    label.append(field, ` ${name}`);
  } else {
    Object.assign(field, { type: "number", step: "any", placeholder: value });
    label.append(`${name} `, field);
  }
  field.name = name;
  return label;
}

// Only what differs from the sampler's own options.
function changedOptions(fieldset, own) {
  const fields = [...fieldset.querySelectorAll("input")];
  const given = fields.map((field) => [field.name, field.type === "checkbox" ? field.checked : number(field)]);
  return Object.fromEntries(given.filter(([name, value]) => value !== null && value !== own[name]));
}

function json(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`Response format: this is not JSON (${error.message}).`);
  }
}

// The panel of the model that `served` describes; `letter` names it where there are two.
export function settingsPanel(letter, served) {
  const element = elementOf("panel-template");
  const field = (name) => element.querySelector(`[name=${name}]`);
  const options = element.querySelector(".options");
  const chosen = () => served.samplers.find((sampler) => sampler.name === field("sampler").value);  // none: the server's own

  function listOptions() {
    const own = Object.entries(chosen()?.options ?? {});
    options.replaceChildren(options.firstElementChild, ...own.map(([name, value]) => optionField(name, value)));
    options.hidden = own.length === 0;
  }

  function reset() {
    for (const each of element.querySelectorAll("input, textarea")) each.value = "";
    field("sampler").selectedIndex = 0;
    listOptions();
  }

  // Infilled texts have their length, and no end.
  function suit(mode) {
    for (const each of element.querySelectorAll(".length")) each.hidden = mode === "infill";
  }

  // The part of a request that these settings make.
  function read(mode) {
    const given = Object.fromEntries(NUMBERS.map((name) => [name, number(field(name))]).filter(([, value]) => value !== null));
    const { block_length, max_tokens, ...rest } = given;
    const stop = field("stop").value.split("\n").filter((line) => line !== "");
    const format = field("response_format").value.trim();
    return {
      ...rest,
      ...(format ? { response_format: json(format) } : {}),
      ...(mode === "chat" && max_tokens !== undefined ? { max_tokens } : {}),
      ...(mode === "chat" && stop.length ? { stop } : {}),
      dllm: {
        ...(chosen() ? { sampler: chosen().name, sampler_options: changedOptions(options, chosen().options) } : {}),
        ...(block_length === undefined ? {} : { block_length }),
      },
    };
  }

  const heading = element.querySelector("summary");
  heading.id = `settings-${letter}`;
  element.setAttribute("aria-labelledby", heading.id);
  element.querySelector(".letter").textContent = letter;
  field("sampler").replaceChildren(
    new Option(`${served.sampler} (the server's own)`, ""),
    ...served.samplers.map(({ name, kind }) => new Option(kind === "committing" ? name : `${name} (${kind})`, name)),
  );
  field("max_tokens").placeholder = served.gen_length;
  field("block_length").placeholder = served.block_length;
  field("temperature").placeholder = served.temperature ?? 0;
  field("sampler").addEventListener("change", listOptions);
  element.querySelector(".reset").addEventListener("click", reset);
  listOptions();
  return { element, read, suit };
}

// A setting in short: what `read` gave, where the server's own policy is `own`.
export function title({ dllm }, own) {
  const options = Object.entries(dllm.sampler_options ?? {}).map(([name, value]) => `${name}=${value}`);
  return [dllm.sampler ?? own, ...options].join(" ");
}
