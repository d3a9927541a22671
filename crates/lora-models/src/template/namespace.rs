//! Jinja's `namespace`: the one value that a template can change after it was made.
//!
//! minijinja's own may hold itself, and ends the stack when it is printed then. This one holds what
//! has an end.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use minijinja::value::{Kwargs, Object, ObjectRepr, ValueKind, ValueOrKwargs};
use minijinja::{Error, ErrorKind, State, Value};

use super::python::{self, Generator, MAX_DEPTH};

/// A value in a namespace is walked through each time that it is set, and a list that holds another
/// twice, which holds another twice, has no end that is worth waiting for.
const MAX_VALUES: usize = 1_000_000;

#[derive(Debug, Default)]
pub(super) struct Namespace(Mutex<Vec<(String, Value)>>);

impl Namespace {
    fn fields(&self) -> MutexGuard<'_, Vec<(String, Value)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, name: &str) -> Option<Value> {
        let fields = self.fields();
        fields.iter().find(|(other, _)| other == name).map(|(_, value)| value.clone())
    }

    fn set(&self, name: &str, value: Value) -> Result<(), Error> {
        check(name, &value, 0, &mut 0)?;
        let mut fields = self.fields();
        match fields.iter_mut().find(|(other, _)| other == name) {
            Some((_, old)) => *old = value,
            None => fields.push((name.to_owned(), value)),
        }
        Ok(())
    }
}

impl Object for Namespace {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.get(key.as_str()?)
    }

    fn call_method(
        self: &Arc<Self>,
        state: &mut State<'_, '_>,
        method: &str,
        args: &[Value],
    ) -> Result<Value, Error> {
        match self.get(method) {
            Some(value) => value.call(state, args),
            None => Err(Error::from(ErrorKind::UnknownMethod)),
        }
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fields = python::dict(self.fields().clone());
        write!(f, "<Namespace {fields}>")
    }
}

/// `namespace(x=1)` and `namespace({'x': 1})`.
pub(super) fn namespace(defaults: Option<Value>, named: Kwargs) -> Result<Value, Error> {
    let namespace = Namespace::default();
    if let Some(defaults) = defaults {
        if defaults.kind() != ValueKind::Map {
            let found = defaults.kind();
            return Err(refused(format!(
                "namespace: expected a mapping, found a value of type {found}"
            )));
        }
        for name in defaults.try_iter()? {
            namespace.set(&python::str(&name), defaults.get_item(&name)?)?;
        }
    }
    for name in named.args() {
        namespace.set(name, named.get(name)?)?;
    }
    Ok(Value::from_object(namespace))
}

/// What `{% set ns.x = y %}` does, and as a call block `{% set ns.x %}` … `{% endset %}`.
pub(super) fn set(
    state: &mut State,
    namespace: &Value,
    name: &str,
    value: ValueOrKwargs,
) -> Result<Value, Error> {
    let Some(target) = namespace.downcast_object_ref::<Namespace>() else {
        let found = namespace.kind();
        return Err(refused(format!(
            "set .{name}: expected a namespace before the point, found a value of type {found}"
        )));
    };
    let value = match value.into_value() {
        named if named.is_kwargs() => {
            Kwargs::try_from(named)?.get::<Value>("caller")?.call(state, &[])?
        }
        value => value,
    };
    target.set(name, value)?;
    Ok(Value::from(""))
}

fn refused(reason: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}

/// Only namespaces change, so that what holds none cannot come to hold itself. A loop can put lists
/// into lists without an end, which ends the stack when they are dropped.
fn check(name: &str, value: &Value, depth: usize, seen: &mut usize) -> Result<(), Error> {
    let expected = |what: &str, found: &str| {
        Err(refused(format!("namespace attribute {name}: expected {what}, found {found}")))
    };
    *seen += 1;
    if *seen > MAX_VALUES {
        return expected(&format!("at most {MAX_VALUES} values in it"), "more");
    }
    if value.downcast_object_ref::<Namespace>().is_some() {
        return expected("a value without a namespace in it", "a namespace");
    }
    let items = match value.kind() {
        ValueKind::Seq | ValueKind::Map | ValueKind::Iterable if depth == MAX_DEPTH => {
            return expected(&format!("at most {MAX_DEPTH} levels"), "more");
        }
        ValueKind::Map => {
            let keys = value.try_iter()?;
            keys.map(|key| value.get_item(&key)).collect::<Result<_, _>>()?
        }
        ValueKind::Iterable if value.len().is_none() => {
            match value.downcast_object_ref::<Generator>() {
                Some(generator) => generator.rest(),
                None => {
                    return expected("a list", "what gives out items once; make it one by |list");
                }
            }
        }
        ValueKind::Seq | ValueKind::Iterable => value.try_iter()?.collect::<Vec<_>>(),
        _ => Vec::new(),
    };
    items.iter().try_for_each(|item| check(name, item, depth + 1, seen))
}
