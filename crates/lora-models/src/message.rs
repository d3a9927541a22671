//! One turn of a conversation.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

/// One turn of a conversation: who speaks, what is said, and what else a chat template may read.
///
/// It is read from and written to JSON as the object that Hugging Face and OpenAI use:
///
/// ```
/// use lora_models::Message;
/// use serde_json::json;
///
/// let call = json!({"name": "weather", "arguments": {"city": "Zürich"}});
/// let message = Message::new("assistant", json!(null))
///     .with("tool_calls", json!([{"type": "function", "function": call}]));
/// assert_eq!(message, serde_json::from_value(json!({
///     "role": "assistant",
///     "tool_calls": [
///         {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}},
///     ],
/// }))?);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, `tool`, or what else the model's template knows.
    pub role: String,
    /// What is said: a text; a list of parts such as `{"type": "text", "text": "..."}`, where the
    /// template knows them; null where nothing is, as beside calls of tools.
    #[serde(default, skip_serializing_if = "Json::is_null")]
    pub content: Json,
    /// All other fields, in their order: `tool_calls`, `tool_call_id`, `name`, `reasoning_content`.
    #[serde(flatten)]
    pub fields: Map<String, Json>,
}

impl Message {
    /// A turn of the given role.
    pub fn new(role: impl Into<String>, content: impl Into<Json>) -> Self {
        Self { role: role.into(), content: content.into(), fields: Map::new() }
    }

    /// What the model is told about its task.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content.into())
    }

    /// What a person says.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content.into())
    }

    /// What the model says.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content.into())
    }

    /// What a tool answers.
    pub fn tool(content: impl Into<String>) -> Self {
        Self::new("tool", content.into())
    }

    /// The same turn with one more field, or another value in it.
    pub fn with(mut self, name: impl Into<String>, value: impl Into<Json>) -> Self {
        self.fields.insert(name.into(), value.into());
        self
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn json_is_read_and_written_with_all_its_fields_in_order() {
        let text = r#"{"role":"assistant","content":[{"type":"text","text":"é"}],"z":1,"a":{"y":0,"b":0}}"#;
        let message: Message = serde_json::from_str(text).unwrap();
        assert_eq!(message.content[0]["text"], "é");
        assert_eq!(message.fields.keys().collect::<Vec<_>>(), ["z", "a"]);
        assert_eq!(serde_json::to_string(&message).unwrap(), text);
    }

    #[test]
    fn a_turn_without_content_has_no_such_field() {
        let message = Message::new("assistant", Json::Null).with("name", "x").with("name", "y");
        assert_eq!(json!(message), json!({"role": "assistant", "name": "y"}));
        assert_eq!(serde_json::from_value::<Message>(json!(message)).unwrap(), message);
    }

    #[test]
    fn the_roles_have_their_names() {
        let roles =
            [Message::system(""), Message::user(""), Message::assistant(""), Message::tool("")];
        let roles: Vec<_> = roles.iter().map(|message| message.role.as_str()).collect();
        assert_eq!(roles, ["system", "user", "assistant", "tool"]);
    }
}
