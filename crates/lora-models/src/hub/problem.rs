//! What can go wrong with a model of the Hub.

use std::path::PathBuf;

/// What is wrong with a model of the Hub. Prints as the rest of a sentence that begins with the model's
/// name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HubProblem {
    /// The name is none.
    #[error(
        "expected a Hugging Face folder, a GGUF file, or a model of the Hub as owner/name, \
         owner/name@revision or owner/name/file.gguf, found nothing of that name"
    )]
    Name,
    /// There is no such repository, or not for this user: the Hub does not tell these apart.
    #[error("{endpoint} has no {}", not_found(*with_token))]
    NotFound {
        /// The server.
        endpoint: String,
        /// Whether a token was sent.
        with_token: bool,
    },
    /// The repository does not have this branch, tag or commit.
    #[error(
        "there is no revision '{revision}'; give a branch, a tag or a whole commit after the @"
    )]
    Revision {
        /// What was asked for.
        revision: String,
    },
    /// The repository's files are for those who accepted its terms.
    #[error("it is gated: {} at {page}", gated(*with_token))]
    Gated {
        /// Where the terms are.
        page: String,
        /// Whether a token was sent.
        with_token: bool,
    },
    /// The server refuses the token or the user.
    #[error("{endpoint} refuses it: {reason}; check the token in HF_TOKEN or of `hf auth login`")]
    Denied {
        /// The server.
        endpoint: String,
        /// What it says.
        reason: String,
    },
    /// There is no connection, or the server is down, and the cache does not have the model.
    #[error(
        "{endpoint} cannot be reached ({reason}) and the cache lacks {missing}; check the network",
        missing = missing.join(", ")
    )]
    Unreachable {
        /// The server.
        endpoint: String,
        /// What happened.
        reason: String,
        /// The files that the cache does not have.
        missing: Vec<String>,
    },
    /// The network may not be used, and the cache does not have the model.
    #[error(
        "the cache {cache} lacks {missing}, and the network is not to be used; fetch the model once \
         without HF_HUB_OFFLINE",
        cache = cache.display(), missing = missing.join(", ")
    )]
    Offline {
        /// The folder of the cache.
        cache: PathBuf,
        /// The files that it does not have.
        missing: Vec<String>,
    },
    /// The server's answer is not one of the Hub.
    #[error("{url}: expected {expected}, found {found}; check HF_ENDPOINT, or try again later")]
    Answer {
        /// What was asked for.
        url: String,
        /// What the Hub answers.
        expected: String,
        /// What came.
        found: String,
    },
    /// The repository does not have the files of a model.
    #[error("the repository has no {missing}; {advice}", missing = missing.join(" and no "))]
    Files {
        /// What is not there.
        missing: Vec<String>,
        /// What is, or what to do.
        advice: String,
    },
    /// A download ended before the file did.
    #[error(
        "{file}: expected {total} bytes, found {done} when the download broke off ({reason}); start again \
         to go on from there"
    )]
    Interrupted {
        /// The file in the repository.
        file: String,
        /// Bytes that came.
        done: u64,
        /// Bytes of the file.
        total: u64,
        /// What happened.
        reason: String,
    },
    /// What came is not the file that the server lists.
    #[error("{file}: expected {expected}, found {found}; nothing of it was kept, so try again")]
    Damaged {
        /// The file in the repository.
        file: String,
        /// The size or digest in the server's list.
        expected: String,
        /// What came.
        found: String,
    },
}

fn not_found(with_token: bool) -> &'static str {
    match with_token {
        true => {
            "model of this name that your token may read; check the name and the token's rights"
        }
        false => "public model of this name; check the name, or set HF_TOKEN if it is private",
    }
}

fn gated(with_token: bool) -> &'static str {
    match with_token {
        true => "with the account of your token, accept its terms",
        false => "set HF_TOKEN to the token of an account that has accepted its terms",
    }
}
