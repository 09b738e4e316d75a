// One element of the loss, for the host's kernels and the device's: error(d) of the difference d =
// prediction - target, and its derivative.
#pragma once
#include "kernels.h"

namespace salt {

template <typename A>
SALT_HD A error_of(Kind kind, A d) {
  const A size = d < 0 ? -d : d;
  switch (kind) {
    case Kind::l1:
      return size;
    case Kind::smooth_l1:
      return size < 1 ? A(0.5) * d * d : size - A(0.5);  // beta 1
    default:
      return d * d;
  }
}

// error'(d) is slope_factor * slope_of(d); the factor is multiplied into the scale once.
SALT_HD double slope_factor(Kind kind) { return kind == Kind::mse ? 2 : 1; }

template <typename A>
SALT_HD A slope_of(Kind kind, A d) {
  switch (kind) {
    case Kind::l1:
      return d > 0 ? A(1) : d < 0 ? A(-1) : d;  // 0 at 0; a nan stays one
    case Kind::smooth_l1:
      return d > 1 ? A(1) : d < -1 ? A(-1) : d;
    default:
      return d;
  }
}

}  // namespace salt
