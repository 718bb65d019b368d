// Generates with a decoder, greedily: token ids in, token ids out, one row after the other.
// decoder.txt, which deploy wrote, contains what this loop must know of the graph.
#ifndef ROTARY_EXPORT_DECODER_H_
#define ROTARY_EXPORT_DECODER_H_

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <iterator>
#include <limits>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

using Ids = std::vector<int64_t>;

struct Decoder {
  std::string tokens, logits;        // Names of an input and an output.
  std::string logits_dtype, holder;  // `holder` has max_positions: the model, or the cache.
  int64_t num_tokens = 0, vocab_size = 0, last_logits = 0;
  int64_t chunk = 1;                              // How many tokens of a prompt a run has at most.
  int64_t max_cache_len = 0;                      // Of a static cache; 0: it grows.
  int64_t max_positions = -1, max_past_len = -1;  // -1: any number.
  Ids eos_token_ids, suppress_tokens;
  Ids cache_resets, length_thresholds;  // Lengths past which the cache, the angles are others.
  float repetition_penalty = 1;
};

[[noreturn]] inline void Refuse(const std::string& message) { throw std::runtime_error(message); }

inline bool Contains(const Ids& ids, int64_t id) {
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

// Lines: a name, and its values. "refused WHY": this loop can't run the graph.
inline Decoder ReadDecoder(const std::string& path) {
  std::ifstream file(path);
  if (!file) Refuse(path + " can't be read: deploy writes it for a model exported with its cache");
  Decoder found;
  const std::map<std::string, std::string*> names = {{"tokens", &found.tokens},
                                                     {"logits", &found.logits},
                                                     {"logits_dtype", &found.logits_dtype},
                                                     {"holder", &found.holder}};
  const std::map<std::string, int64_t*> numbers = {
      {"num_tokens", &found.num_tokens},       {"vocab_size", &found.vocab_size},
      {"last_logits", &found.last_logits},     {"chunk", &found.chunk},
      {"max_cache_len", &found.max_cache_len}, {"max_positions", &found.max_positions},
      {"max_past_len", &found.max_past_len}};
  const std::map<std::string, Ids*> lists = {{"eos_token_ids", &found.eos_token_ids},
                                             {"suppress_tokens", &found.suppress_tokens},
                                             {"cache_resets", &found.cache_resets},
                                             {"length_thresholds", &found.length_thresholds}};
  for (std::string line, name; std::getline(file, line);) {
    std::istringstream words(line);
    words >> name;
    if (name == "refused") Refuse(line.substr(name.size() + 1));
    if (name == "repetition_penalty") words >> found.repetition_penalty;
    if (names.count(name)) words >> *names.at(name);
    if (numbers.count(name)) words >> *numbers.at(name);
    if (lists.count(name)) lists.at(name)->assign(std::istream_iterator<int64_t>(words), {});
  }
  if (found.num_tokens < 1 || found.vocab_size < 1) Refuse(path + " does not describe a decoder");
  return found;
}

inline void CheckPrompt(const Decoder& decoder, const Ids& prompt, int64_t row, int64_t count) {
  const auto text = [](int64_t number) { return std::to_string(number); };
  const int64_t length = prompt.size(), most = decoder.max_positions;
  for (int64_t i = 0; i < length; ++i) {
    if (prompt[i] >= 0 && prompt[i] < decoder.num_tokens) continue;
    Refuse("token ids must be >= 0 and < " + text(decoder.num_tokens) + ", got " + text(prompt[i]) +
           " in row " + text(row) + ", column " + text(i));
  }
  if (decoder.max_past_len >= 0 && length + count - 2 > decoder.max_past_len) {
    Refuse("past_seq_len must be <= " + text(decoder.max_past_len) + ", " +
           text(length + count - 2) + " would be needed");
  }
  if (most >= 0 && length > most) {
    Refuse("prompts must have <= " + text(most) + " tokens, the " + decoder.holder +
           "'s positions, got " + text(length));
  }
  if (most >= 0 && length + count - 1 > most) {  // The last new token is never read.
    Refuse("max_new_tokens must be <= " + text(most - length + 1) + " after a prompt of " +
           text(length) + " tokens, the " + decoder.holder + " has " + text(most) +
           " positions, got " + text(count));
  }
}

// Prompts of token ids, and how many tokens at most each gets.
struct Request {
  int64_t max_new_tokens;
  std::vector<Ids> prompts;
};

// Reads MAX_NEW_TOKENS IDS..., as "32", "5,6,7".
inline Request ReadRequest(const Decoder& decoder, const std::vector<std::string>& words) {
  const auto read = [](const std::string& text) {
    const bool is_integer = text.find_first_not_of("0123456789") == std::string::npos;
    if (!is_integer || text.empty() || text.size() > 18) {
      Refuse("'" + text + "' is not an integer >= 0");
    }
    return static_cast<int64_t>(std::stoll(text));
  };
  Request request{read(words.at(0)), {}};
  if (request.max_new_tokens < 1) Refuse("max_new_tokens must be >= 1, got " + words[0]);
  for (size_t row = 0; row + 1 < words.size(); ++row) {
    std::istringstream items(words[row + 1] + ",");
    Ids& prompt = request.prompts.emplace_back();
    for (std::string item; std::getline(items, item, ',');) prompt.push_back(read(item));
    CheckPrompt(decoder, prompt, row, request.max_new_tokens);
  }
  return request;
}

// Chooses as transformers' greedy `generate`; changes the scores, (vocab_size,).
inline int64_t ChooseToken(const Decoder& decoder, const std::vector<bool>& seen, float* scores) {
  const float penalty = decoder.repetition_penalty;
  for (int64_t id = 0; penalty != 1 && id < decoder.vocab_size; ++id) {
    if (seen[id]) scores[id] = scores[id] < 0 ? scores[id] * penalty : scores[id] / penalty;
  }
  for (int64_t id : decoder.suppress_tokens) {
    if (id < decoder.vocab_size) scores[id] = -std::numeric_limits<float>::infinity();
  }
  return std::max_element(scores, scores + decoder.vocab_size) - scores;
}

// Computes the cache of a row anew, in runs of some tokens; returns the scores after it.
template <typename Graph>
float* Fill(const Decoder& decoder, const Ids& row, Graph& graph) {
  const int64_t length = row.size();
  const auto is_passed = [length](int64_t threshold) { return threshold < length; };
  const Ids& thresholds = decoder.length_thresholds;
  // Past a threshold all tokens need the angles of the whole length.
  const bool is_whole = std::any_of(thresholds.begin(), thresholds.end(), is_passed);
  const int64_t chunk = is_whole ? length : decoder.chunk;
  float* scores = nullptr;
  for (int64_t past = 0; past < length; past += chunk) {
    scores = graph.Run(&row[past], std::min(chunk, length - past), past);
  }
  return scores;
}

// Appends tokens to a row. `graph.Begin(length)` makes room for so many positions;
// `graph.Run(ids, count, past)` runs tokens after so many, and returns the scores after the last.
template <typename Graph>
void Generate(const Decoder& decoder, Ids* row, int64_t count, Graph& graph) {
  const int64_t length = row->size() + count;
  row->reserve(length);
  std::vector<bool> seen(std::max(decoder.vocab_size, decoder.num_tokens));
  for (int64_t id : *row) seen[id] = true;
  graph.Begin(length);
  for (float* scores = Fill(decoder, *row, graph);;) {
    const int64_t past = row->size(), token = ChooseToken(decoder, seen, scores);
    row->push_back(token);
    seen[token] = true;
    if (past + 1 == length || Contains(decoder.eos_token_ids, token)) return;
    // transformers computes its cache anew past these lengths.
    scores = Contains(decoder.cache_resets, past) ? Fill(decoder, *row, graph)
                                                  : graph.Run(&row->back(), 1, past);
  }
}

// Prints the ids of each prompt and its new tokens, "5,6,7,8"; on stderr, the speed.
// `generate(&row)` appends the new tokens.
template <typename Function>
void GenerateRows(const Request& request, Function generate) {
  const auto start = std::chrono::steady_clock::now();
  int64_t new_tokens = 0;
  for (Ids row : request.prompts) {
    new_tokens -= row.size();
    generate(&row);
    new_tokens += row.size();
    for (size_t i = 0; i < row.size(); ++i) std::cout << (i ? "," : "") << row[i];
    std::cout << std::endl;
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::cerr << new_tokens << " tokens in " << seconds.count()
            << " s with the prompts: " << new_tokens / seconds.count() << " tokens/s\n";
}

#endif  // ROTARY_EXPORT_DECODER_H_
