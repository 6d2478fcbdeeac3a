package store

import (
	"errors"
	"fmt"
)

// The errors of a Store, to be told apart with errors.Is. Resources that are
// not valid give a *resealv1.ViolationsError.
var (
	// ErrConflict means that the expected revision is not the current one.
	// The error is a *ConflictError.
	ErrConflict = errors.New("the configuration was changed meanwhile")
	// ErrNotFound means that a named resource does not exist.
	ErrNotFound = errors.New("not found")
	// ErrNotKept means that a revision is not, or no longer, in the history.
	ErrNotKept = errors.New("revision is not kept")
	// ErrTooLarge means that a change does not fit into one etcd transaction.
	// Nothing was sent.
	ErrTooLarge = errors.New("change is too large for one transaction")
	// ErrFull means that etcd has no room for the change. Nothing changed.
	ErrFull = errors.New("no room for the change")
	// ErrLargeChange means that a change takes away so much that whoever makes it
	// has to say that it is meant. Nothing changed.
	ErrLargeChange = errors.New("this is a large change")
	// ErrUnavailable means that etcd can't be reached, or did not answer in
	// time. It is safe to try again.
	ErrUnavailable = errors.New("the store is unavailable")
)

// unavailable is the ErrUnavailable that cause, an error of the etcd client,
// leads to. It does not wrap cause: the deadline of a single request to etcd
// must not look like that of the caller.
func unavailable(cause error) error {
	return fmt.Errorf("%w: etcd: %s", ErrUnavailable, cause.Error())
}

// ConflictError is the ErrConflict of a call whose expected revision is not
// the current one.
type ConflictError struct {
	// Expected is the revision that the caller looked at.
	Expected int64
	// Current is the revision that the store is at.
	Current int64
}

// Error names both revisions.
func (e *ConflictError) Error() string {
	return fmt.Sprintf("%v: expected revision %d, the current one is %d; read again and retry", ErrConflict, e.Expected, e.Current)
}

// Unwrap is ErrConflict.
func (e *ConflictError) Unwrap() error { return ErrConflict }

// CurrentRevision is Current. It lets callers read it without this package.
func (e *ConflictError) CurrentRevision() int64 { return e.Current }
