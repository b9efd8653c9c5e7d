// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Lists of a guest's objects, some of which cannot be read.

use kvmmem_linux::KernelError;

/// Walks of a list that changes, before its error counts.
const TRIES: u32 = 3;

/// The items of a walk that can be read.
pub(crate) struct Listing<T> {
    pub(crate) rows: Vec<T>,
    /// How many cannot: at least this many.
    pub(crate) lost: usize,
}

/// Collects what a walk finds, again where something of it cannot be read: the guest may have
/// changed it meanwhile.
///
/// # Errors
/// The walk's, where it finds nothing.
pub(crate) fn collect<T, I>(
    walk: impl Fn() -> Result<I, KernelError>,
) -> Result<Listing<T>, KernelError>
where
    I: Iterator<Item = Result<T, KernelError>>,
{
    let once = || {
        let (mut listed, mut first) = (Listing { rows: Vec::new(), lost: 0 }, None);
        for item in walk()? {
            match item {
                Ok(row) => listed.rows.push(row),
                Err(error) if error.is_local() => {
                    listed.lost += 1;
                    first = first.or(Some(error));
                }
                Err(error) => return Err(error),
            }
        }
        match first {
            Some(error) if listed.rows.is_empty() => Err(error),
            _ => Ok(listed),
        }
    };
    let mut result = once();
    for _ in 1..TRIES {
        if result.as_ref().is_ok_and(|listed| listed.lost == 0) {
            break;
        }
        result = once();
    }
    result
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn what_cannot_be_read_is_counted_after_it_was_tried_again() {
        let damage = |gva| KernelError::Malformed { what: "the task".to_owned(), gva };
        let walks = Cell::new(0);
        let walk = |lost: fn(u32) -> bool| {
            walks.set(0);
            collect(|| {
                walks.set(walks.get() + 1);
                let is_lost = lost(walks.get());
                Ok([Ok(1), Err(damage(2)), Ok(3)]
                    .into_iter()
                    .filter(move |item| item.is_ok() || is_lost))
            })
        };
        let listed = walk(|_| true).unwrap();
        assert_eq!((listed.rows, listed.lost, walks.get()), (vec![1, 3], 1, TRIES));
        let listed = walk(|walk| walk == 1).unwrap();
        assert_eq!((listed.rows, listed.lost, walks.get()), (vec![1, 3], 0, 2));
        let nothing = collect(|| Ok([Err::<u32, _>(damage(2)), Err(damage(3))].into_iter()));
        assert!(matches!(nothing.err(), Some(KernelError::Malformed { gva: 2, .. })));
    }
}
