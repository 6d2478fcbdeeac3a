package audit

import (
	"context"
	"errors"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/reseal/reseal/controlplane/mirror"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// pageSize bounds the entries of one answer of etcd, and of one response: 100 of the
	// largest are 3.2 MiB.
	pageSize = 100
	// followPause is waited before the log is read on after trouble.
	followPause = time.Second
)

// stored is an entry as it was found.
type stored struct {
	*resealv1.AuditEntry
	record []byte
}

// reader reads the log from a number on.
type reader struct {
	log      *Log
	next     uint64
	previous string // hash of the entry before next, "" when it was not read
}

// page reads the next entries; none at the end.
func (r *reader) page(ctx context.Context) ([]stored, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	end := clientv3.GetPrefixRangeEnd(r.log.config.Prefix + "audit/entries/")
	answer, err := r.log.config.Client.Get(ctx, r.log.entryKey(r.next), clientv3.WithRange(end), clientv3.WithLimit(pageSize))
	if err != nil {
		return nil, err
	}
	var found []stored
	for _, kv := range answer.Kvs {
		found = append(found, r.take(kv.Value, kv.ModRevision))
	}
	return found, nil
}

// take reads a record and checks that it follows the one before.
func (r *reader) take(record []byte, revision int64) stored {
	entry := &resealv1.AuditEntry{}
	err := protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(record, entry)
	if err != nil {
		entry = &resealv1.AuditEntry{Number: r.next, Error: "the record can't be read"}
	}
	entry.Hash, entry.Revision = hashOf(record), 0
	if strings.HasPrefix(entry.GetAction(), "AdminService.") && entry.GetOutcome() == "OK" {
		entry.Revision = revision // they were written in one transaction
	}
	gap := entry.GetNumber() != r.next && r.previous != ""
	entry.Broken = err != nil || gap || r.previous != "" && entry.GetPrevious() != r.previous
	r.next, r.previous = entry.GetNumber()+1, entry.GetHash()
	return stored{entry, record}
}

// follow delivers entries as they are made until ctx ends or deliver fails. Trouble
// with etcd is tried again.
func (r *reader) follow(ctx context.Context, deliver func([]stored) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var failed deliveryError
	read := func() {
		for ctx.Err() == nil {
			err := r.all(ctx, deliver)
			if err == nil {
				return
			}
			if errors.As(err, &failed) {
				cancel()
				return
			}
			if ctx.Err() == nil {
				r.log.config.Logger.Warn("lost track of the audit log in etcd, reading on", "error", err)
			}
			pause(ctx, followPause)
		}
	}
	// The head's key alone: it changes with each entry, and says when to read.
	mirror.Follow(ctx, mirror.Config{
		Client:         r.log.config.Client,
		Prefix:         r.log.headKey(),
		RequestTimeout: requestTimeout,
		Logger:         r.log.config.Logger,
		Subject:        "the audit log",
		Load:           func(mirror.Contents) { read() },
		Take:           func([]*clientv3.Event) { read() },
	})
	return failed.error
}

// pause waits, or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

type deliveryError struct{ error }

// all delivers everything up to the end.
func (r *reader) all(ctx context.Context, deliver func([]stored) error) error {
	for {
		found, err := r.page(ctx)
		if err != nil || len(found) == 0 {
			return err
		}
		if err := deliver(found); err != nil {
			return deliveryError{err}
		}
	}
}

// Read implements AdminService.ReadAudit.
func (l *Log) Read(request *resealv1.ReadAuditRequest, stream grpc.ServerStreamingServer[resealv1.ReadAuditResponse]) error {
	if err := request.GetSince().CheckValid(); request.GetSince() != nil && (err != nil || request.GetSince().AsDuration() < 0) {
		return status.Error(codes.InvalidArgument, "since: must be a duration of at least 0s")
	}
	var from time.Time
	if request.GetSince() != nil {
		from = time.Now().Add(-request.GetSince().AsDuration())
	}
	send := func(found []stored) error {
		response := &resealv1.ReadAuditResponse{}
		for _, entry := range found {
			if selects(request, from, entry.AuditEntry) {
				response.Entries = append(response.Entries, entry.AuditEntry)
			}
		}
		if len(response.GetEntries()) == 0 {
			return nil
		}
		return stream.Send(response)
	}
	r := &reader{log: l, next: 1}
	if request.GetFollow() {
		if err := r.follow(stream.Context(), send); err != nil {
			return err
		}
		return stream.Context().Err()
	}
	err := r.all(stream.Context(), send)
	var failed deliveryError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &failed):
		return failed.error
	case stream.Context().Err() != nil:
		return stream.Context().Err()
	}
	l.config.Logger.Warn("the audit log could not be read", "error", err)
	return status.Error(codes.Unavailable, "the store does not answer; try again")
}

// selects tells whether a request asks for an entry.
func selects(request *resealv1.ReadAuditRequest, from time.Time, entry *resealv1.AuditEntry) bool {
	if entry.GetBroken() {
		return true // nobody who looks must miss it
	}
	if entry.GetTime().AsTime().Before(from) {
		return false
	}
	if user := request.GetUser(); user != "" && entry.GetUser() != user && !strings.HasSuffix(entry.GetUser(), "/"+user) {
		return false
	}
	if request.GetResource() == "" {
		return true
	}
	for _, r := range entry.GetResources() {
		if strings.EqualFold(r.GetResource(), request.GetResource()) {
			return true
		}
	}
	return false
}
