// The operators that the extension registers, by file. Each is private to the backend and trusts
// its caller for shapes and dtypes: contiguous rows, words of 32 bits. Schemas, with what an
// argument is for, are in bae_fast/backends/cpp/extension.py.
#pragma once

#include <tuple>

#include "tensors.h"

namespace bae_fast {

// layouts.cpp
Tensor rows_to_columns(Tensor words, int64_t n_columns);
Tensor rows_to_features(Tensor words, int64_t n_columns);
Tensor column_counts(Tensor words, int64_t n_columns);
int64_t count_ones(Tensor words);

// salient.cpp
Tensor salient(Tensor words, Tensor order, int64_t n_columns, int64_t k);
std::tuple<Tensor, Tensor> grouped(Tensor numbers, int64_t n_groups);

// search.cpp
Tensor search(Tensor projection, Tensor gram, Tensor on, Tensor off, int64_t most, double least,
              Tensor words);

// covariance.cpp
std::tuple<Tensor, Tensor> covariance(Tensor words, Tensor counts, int64_t n_rows, bool keep_signs);

// pair_lists.cpp
std::tuple<Tensor, Tensor> pair_lists(Tensor words, Tensor counts, int64_t n_rows, double list_cost,
                                      bool all_rows);
Tensor list_rows(Tensor words, Tensor ranks, int64_t n_features);
Tensor listed_covariance(Tensor ranks, Tensor lists, int64_t n_features, int64_t n_rows);

// pair_counts.cpp
Tensor pair_counts(Tensor words, Tensor place, int64_t k, double list_cost);
Tensor common_ones(Tensor left, Tensor rows, Tensor index);

// products.cpp
void threshold(Tensor pre, std::optional<Tensor> bias, std::optional<Tensor> keep, double width,
               int64_t start, Tensor words, Tensor window);
int64_t unit_kind();
bool unit_encode(Tensor x, Tensor W, Tensor bias, std::optional<Tensor> keep, double width,
                 int64_t digits, Tensor words, Tensor window);
bool unit_product(Tensor left, Tensor right, int64_t digits, bool add, Tensor out);
bool bits_product(Tensor bits, Tensor dense, bool gather, bool add, Tensor out);
void gather_rows(Tensor bits, Tensor dense, std::optional<Tensor> bias, Tensor out);

// backward.cpp
void backward(Tensor g, Tensor words, int64_t start, std::optional<Tensor> shift,
              std::optional<Tensor> curvature, bool covariance, std::optional<Tensor> signs,
              std::optional<Tensor> columns, std::optional<Tensor> ranks,
              std::optional<Tensor> counted, std::optional<Tensor> at_hand, Tensor counts,
              int64_t n_rows, std::optional<Tensor> digits, double scale,
              std::optional<Tensor> window, std::optional<Tensor> factor,
              std::optional<Tensor> keep, bool official, Tensor column_sum);
bool unit_backward(Tensor x, Tensor grad_recon, Tensor W_dec, int64_t digits_of_numbers,
                   Tensor words, std::optional<Tensor> shift, std::optional<Tensor> curvature,
                   bool covariance, std::optional<Tensor> signs, std::optional<Tensor> columns,
                   std::optional<Tensor> ranks, std::optional<Tensor> counted,
                   std::optional<Tensor> at_hand, Tensor counts, int64_t n_rows,
                   std::optional<Tensor> digits, double scale, std::optional<Tensor> window,
                   std::optional<Tensor> keep, bool official, Tensor column_sum, Tensor grad_W);

// sparse_backward.cpp
Tensor list_window(Tensor window, std::optional<Tensor> keep, int64_t most);
void sparse_backward(Tensor entries, Tensor words, std::optional<Tensor> grad_recon, Tensor W_dec,
                     std::optional<Tensor> shift, std::optional<Tensor> curvature, bool covariance,
                     std::optional<Tensor> signs, std::optional<Tensor> columns,
                     std::optional<Tensor> ranks, std::optional<Tensor> counted,
                     std::optional<Tensor> at_hand, Tensor counts, int64_t n_rows,
                     std::optional<Tensor> digits, double scale, Tensor x, Tensor W_enc,
                     Tensor grad_x, Tensor grad_W, Tensor column_sum);

// losses.cpp
Tensor entropy(Tensor counts, int64_t n_rows);
void entropy_slopes(Tensor counts, int64_t n_rows, double scale, Tensor out);
Tensor squared_error(Tensor recon, Tensor target, Tensor unit, std::optional<Tensor> keep);
void squared_error_gradient(Tensor recon, Tensor target, Tensor unit, std::optional<Tensor> keep,
                            double scale, Tensor out);

// gradients.cpp
Tensor new_gradient(int64_t rows, int64_t columns);

}  // namespace bae_fast
