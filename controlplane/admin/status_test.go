package admin_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/reseal/reseal/controlplane/admin"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// fakeStore fails as a test wants, and shows the snapshots of a test.
type fakeStore struct {
	err       error
	first     *resealv1.Snapshot
	snapshots chan *resealv1.Snapshot
}

func (f *fakeStore) Snapshot() *resealv1.Snapshot { return f.first }

func (f *fakeStore) Next(ctx context.Context, _ int64) (*resealv1.Snapshot, error) {
	select {
	case snapshot, ok := <-f.snapshots:
		if !ok {
			return nil, f.err
		}
		return snapshot, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (f *fakeStore) Redact(r *resealv1.Resource) *resealv1.Resource { return r }

func (f *fakeStore) Apply(context.Context, string, *resealv1.ApplyRequest) (*resealv1.ApplyResponse, error) {
	return nil, f.err
}

func (f *fakeStore) Delete(context.Context, string, *resealv1.DeleteRequest) (*resealv1.DeleteResponse, error) {
	return nil, f.err
}

func (f *fakeStore) Rollback(context.Context, string, *resealv1.RollbackRequest) (*resealv1.RollbackResponse, error) {
	return nil, f.err
}

func (f *fakeStore) Revisions(context.Context, *resealv1.ListRevisionsRequest) (*resealv1.ListRevisionsResponse, error) {
	return nil, f.err
}

type conflict struct{}

func (conflict) Error() string          { return "the current revision is 42" }
func (conflict) CurrentRevision() int64 { return 42 }

// safeBuffer is a log that is written and read concurrently.
type safeBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// Every error of the store becomes the same status in every method, and none
// Unknown.
func TestErrorsOfTheStore(t *testing.T) {
	known, odd := errors.New("down"), errors.New("odd")
	cases := []struct {
		name string
		err  error
		want codes.Code
	}{
		{"by code", fmt.Errorf("etcd: %w", known), codes.Unavailable},
		{"mapped to Unknown", odd, codes.Internal},
		{"violations", &resealv1.ViolationsError{Violations: noPort(pool("a", "x"))}, codes.InvalidArgument},
		{"no violations", &resealv1.ViolationsError{}, codes.InvalidArgument},
		{"conflict", fmt.Errorf("late: %w", conflict{}), codes.Aborted},
		{"canceled", fmt.Errorf("x: %w", context.Canceled), codes.Canceled},
		{"deadline", context.DeadlineExceeded, codes.DeadlineExceeded},
		{"any other", errors.New("disk on fire at /secret/place"), codes.Internal},
	}
	log := &safeBuffer{}
	fake := &fakeStore{first: resealv1.NewSnapshot("c", 1, nil)}
	client := dial(t, admin.Config{
		Store:  fake,
		Codes:  []admin.ErrorCode{{Is: known, Code: codes.Unavailable}, {Is: odd, Code: codes.Unknown}},
		Logger: slog.New(slog.NewTextHandler(log, nil)),
	})
	for _, c := range cases {
		fake.err = c.err
		fake.snapshots = make(chan *resealv1.Snapshot)
		close(fake.snapshots)
		calls := map[string]func() error{
			"Apply": func() error {
				_, err := client.Apply(t.Context(), &resealv1.ApplyRequest{Resources: []*resealv1.Resource{pool("a")}})
				return err
			},
			"Delete": func() error {
				_, err := client.Delete(t.Context(), &resealv1.DeleteRequest{Resources: []*resealv1.ResourceRef{ref("Route", "a")}})
				return err
			},
			"Rollback": func() error {
				_, err := client.Rollback(t.Context(), &resealv1.RollbackRequest{})
				return err
			},
			"ListRevisions": func() error {
				_, err := client.ListRevisions(t.Context(), &resealv1.ListRevisionsRequest{})
				return err
			},
			"Watch": func() error {
				stream, err := client.Watch(t.Context(), &resealv1.WatchRequest{})
				if err != nil {
					return err
				}
				if _, err = stream.Recv(); err != nil {
					return fmt.Errorf("the first message: %w", err)
				}
				_, err = stream.Recv()
				return err
			},
		}
		for method, call := range calls {
			if err := call(); status.Code(err) != c.want {
				t.Errorf("%s: %s: %v, want %v", c.name, method, err, c.want)
			}
		}
	}
	// Internal errors stay in the log, found by their id.
	fake.err = errors.New("disk on fire at /secret/place")
	_, err := client.Rollback(t.Context(), &resealv1.RollbackRequest{})
	message := status.Convert(err).Message()
	id := message[strings.LastIndex(message, " ")+1:]
	if strings.Contains(message, "secret") || !strings.Contains(log.String(), id) || !strings.Contains(log.String(), "disk on fire") {
		t.Errorf("the caller got %q; the log is %s", message, log)
	}
}

// However much is wrong, the status stays small enough to travel.
func TestStatusIsBounded(t *testing.T) {
	fake := &fakeStore{first: resealv1.NewSnapshot("c", 1, nil)}
	client := dial(t, admin.Config{
		Store:  fake,
		Logger: slog.New(slog.DiscardHandler),
		Validate: func(r *resealv1.Resource) []*resealv1.Violation {
			return []*resealv1.Violation{violation(r, "spec", "x"+strings.Repeat("é", 5000))}
		},
	})
	many := make([]*resealv1.Resource, 10_000)
	for i := range many {
		many[i] = pool(fmt.Sprintf("p%d", i))
	}
	_, err := client.Apply(t.Context(), &resealv1.ApplyRequest{Resources: many})
	if got := fields(t, err); len(got) != 500 || got[0] != "BackendPool/p0: spec" {
		t.Errorf("%d violations, first %q", len(got), got[:min(1, len(got))])
	}
	if message := status.Convert(err).Message(); !strings.Contains(message, "9999 more") || len(message) > 2000 {
		t.Errorf("%d bytes of message: %.100s", len(message), message)
	}
	for _, detail := range status.Convert(err).Details() {
		if bad, ok := detail.(*errdetails.BadRequest); ok && len(bad.FieldViolations[0].Description) > 1100 {
			t.Errorf("a description of %d bytes", len(bad.FieldViolations[0].Description))
		}
	}
}

// A replica whose etcd was restored or replaced has lost its place.
func TestWatchResets(t *testing.T) {
	a, b := pool("a", "10.0.0.1:1"), pool("b", "10.0.0.1:1")
	a.Metadata.Revision, b.Metadata.Revision = 5, 7
	fake := &fakeStore{first: resealv1.NewSnapshot("", 0, nil), snapshots: make(chan *resealv1.Snapshot, 10)}
	client := dial(t, admin.Config{Store: fake, Logger: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := client.Watch(ctx, &resealv1.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	steps := []struct {
		name     string
		snapshot *resealv1.Snapshot // nil: the first
		reset    bool
		want     []string
	}{
		{"before the first load", nil, true, []string{}},
		{"the first load", resealv1.NewSnapshot("c", 7, []*resealv1.Resource{a, b}), false, []string{"BackendPool/a", "BackendPool/b"}},
		{"back in time", resealv1.NewSnapshot("c", 6, []*resealv1.Resource{a}), true, []string{"BackendPool/a"}},
		{"another cluster", resealv1.NewSnapshot("d", 9, []*resealv1.Resource{a}), true, []string{"BackendPool/a"}},
	}
	for _, step := range steps {
		if step.snapshot != nil {
			fake.snapshots <- step.snapshot
		}
		resp := recv(t, stream)
		if resp.Reset_ != step.reset {
			t.Errorf("%s: reset is %v", step.name, resp.Reset_)
		}
		diff(t, step.name, names(resp.Resources), step.want)
	}
}
