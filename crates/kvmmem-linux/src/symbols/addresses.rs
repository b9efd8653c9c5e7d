// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The addresses of kallsyms, 32 bits each. What they are relative to depends on the kernel's
//! version (`kallsyms_sym_address` in `kernel/kallsyms.c`). Nothing in memory names the scheme: it
//! is found by trial.

/// What a number in kallsyms_offsets means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scheme {
    /// Before 6.15: not negative, it is the address itself (of per-CPU symbols); negative, it is
    /// `base - 1 - offset` (CONFIG_KALLSYMS_ABSOLUTE_PERCPU).
    AbsoluteOrNegative,
    /// Without that option, and from 6.15 on: `base + offset`, not signed.
    FromBase,
    /// Later, 7.3 among them: relative to the place of the number.
    FromPlace,
}

impl Scheme {
    pub(super) const ALL: [Self; 3] = [Self::AbsoluteOrNegative, Self::FromBase, Self::FromPlace];

    /// The address that the number `offset`, which lies at `place`, means. `None` where the scheme
    /// needs a base that is not there.
    pub(super) fn address(self, offset: i32, place: u64, base: Option<u64>) -> Option<u64> {
        Some(match self {
            Self::AbsoluteOrNegative if offset >= 0 => u64::from(offset.cast_unsigned()),
            Self::AbsoluteOrNegative => {
                base?.wrapping_sub(1).wrapping_sub(i64::from(offset).cast_unsigned())
            }
            Self::FromBase => base?.wrapping_add(u64::from(offset.cast_unsigned())),
            Self::FromPlace => place.wrapping_add_signed(offset.into()),
        })
    }
}
