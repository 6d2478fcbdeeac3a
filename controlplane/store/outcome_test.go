package store

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// hookedKV is a clientv3.KV whose writing transactions go through a hook.
type hookedKV struct {
	clientv3.KV
	mu   sync.Mutex
	hook func(ctx context.Context, send func() (*clientv3.TxnResponse, error)) (*clientv3.TxnResponse, error)
}

// onWrite sets the hook for the changes to come; nil removes it.
func (k *hookedKV) onWrite(hook func(ctx context.Context, send func() (*clientv3.TxnResponse, error)) (*clientv3.TxnResponse, error)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.hook = hook
}

func (k *hookedKV) Txn(ctx context.Context) clientv3.Txn {
	return &hookedTxn{Txn: k.KV.Txn(ctx), again: func() clientv3.Txn { return k.KV.Txn(context.Background()) }, kv: k, ctx: ctx}
}

type hookedTxn struct {
	clientv3.Txn
	again func() clientv3.Txn
	kv    *hookedKV
	ctx   context.Context
	build func(clientv3.Txn) clientv3.Txn
	cmps  int
}

func (x *hookedTxn) add(step func(clientv3.Txn) clientv3.Txn) clientv3.Txn {
	before := x.build
	if before == nil {
		before = func(txn clientv3.Txn) clientv3.Txn { return txn }
	}
	x.build = func(txn clientv3.Txn) clientv3.Txn { return step(before(txn)) }
	return x
}

func (x *hookedTxn) If(cmps ...clientv3.Cmp) clientv3.Txn {
	x.cmps = len(cmps)
	return x.add(func(txn clientv3.Txn) clientv3.Txn { return txn.If(cmps...) })
}

func (x *hookedTxn) Then(ops ...clientv3.Op) clientv3.Txn {
	return x.add(func(txn clientv3.Txn) clientv3.Txn { return txn.Then(ops...) })
}

func (x *hookedTxn) Else(ops ...clientv3.Op) clientv3.Txn {
	return x.add(func(txn clientv3.Txn) clientv3.Txn { return txn.Else(ops...) })
}

func (x *hookedTxn) Commit() (*clientv3.TxnResponse, error) {
	x.kv.mu.Lock()
	hook := x.kv.hook
	x.kv.mu.Unlock()
	if hook == nil || x.cmps != 2 { // a change has two guards
		return x.build(x.Txn).Commit()
	}
	return hook(x.ctx, func() (*clientv3.TxnResponse, error) { return x.build(x.again()).Commit() })
}

func hookedStore(t *testing.T) (*Store, *hookedKV, Config) {
	t.Helper()
	cfg, _ := testConfig(t)
	kv := &hookedKV{KV: cfg.Client.KV}
	cfg.Client.KV = kv
	// No test waits for it: a machine that is busy must not end requests.
	cfg.RequestTimeout = time.Minute
	return run(t, cfg), kv, cfg
}

type sender = func() (*clientv3.TxnResponse, error)

// The errors after which nobody knows what became of a request.
var openErrors = map[string]error{
	"deadline":     context.DeadlineExceeded,
	"etcd timeout": rpctypes.ErrTimeout,
	"leader lost":  rpctypes.ErrTimeoutDueToLeaderFail,
	"connection":   status.Error(codes.Unavailable, "transport is closing"),
	"plain":        errors.New("something else"),
}

func TestLostAnswerOfACommittedChange(t *testing.T) {
	s, kv, _ := hookedStore(t)
	for name, lost := range openErrors {
		t.Run(name, func(t *testing.T) {
			var committed int64
			kv.onWrite(func(_ context.Context, send sender) (*clientv3.TxnResponse, error) {
				resp, err := send()
				committed = resp.Header.Revision
				return nil, errors.Join(lost, err)
			})
			defer kv.onWrite(nil)
			resp, err := s.Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: []*resealv1.Resource{labelled(pool("a", "10.0.0.1:443"), "n", strings.ReplaceAll(name, " ", "-"))}})
			if err != nil || resp.Revision != committed {
				t.Fatalf("got revision %d, %v; etcd committed at %d", resp.GetRevision(), err, committed)
			}
			if got := s.Snapshot(); got.Revision() != committed || got.Get("BackendPool", "a").GetMetadata().GetRevision() != committed {
				t.Errorf("published revision %d, want %d", got.Revision(), committed)
			}
		})
	}
}

func TestLostRequest(t *testing.T) {
	s, kv, cfg := hookedStore(t)
	for name, lost := range openErrors {
		t.Run(name, func(t *testing.T) {
			before := s.Snapshot().Revision()
			kv.onWrite(func(context.Context, sender) (*clientv3.TxnResponse, error) { return nil, lost })
			request := &resealv1.ApplyRequest{ExpectedRevision: before, Resources: []*resealv1.Resource{labelled(pool("a", "10.0.0.1:443"), "n", strings.ReplaceAll(name, " ", "-"))}}
			_, err := s.Apply(t.Context(), "tester", request)
			kv.onWrite(nil)
			if !errors.Is(err, ErrUnavailable) || errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "nothing was changed") {
				t.Fatalf("got %v, want ErrUnavailable", err)
			}
			if got := headRevision(t, cfg); got != before {
				t.Fatalf("etcd went from revision %d to %d", before, got)
			}
			// Trying again works, with the same expected revision.
			if _, err := s.Apply(t.Context(), "tester", request); err != nil {
				t.Errorf("again: %v", err)
			}
		})
	}
}

func headRevision(t *testing.T, cfg Config) int64 {
	t.Helper()
	resp, err := cfg.Client.Get(context.Background(), cfg.Prefix+"head")
	if err != nil || len(resp.Kvs) != 1 {
		t.Fatalf("head: %v, %v", resp, err)
	}
	return resp.Kvs[0].ModRevision
}

// A request that is held up on its way must not take effect after its caller
// was told that nothing was changed.
func TestDelayedRequestIsVoid(t *testing.T) {
	s, kv, cfg := hookedStore(t)
	var delayed sender
	kv.onWrite(func(_ context.Context, send sender) (*clientv3.TxnResponse, error) {
		delayed = send
		return nil, context.DeadlineExceeded
	})
	_, err := s.Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: []*resealv1.Resource{pool("late", "10.0.0.1:443")}})
	kv.onWrite(nil)
	if !errors.Is(err, ErrUnavailable) {
		t.Fatalf("got %v, want ErrUnavailable", err)
	}
	before := headRevision(t, cfg)
	if resp, err := delayed(); err != nil || resp.Succeeded {
		t.Errorf("the delayed request: %v, %v", resp, err)
	}
	if got := headRevision(t, cfg); got != before || s.Snapshot().Get("BackendPool", "late") != nil {
		t.Errorf("the delayed request took effect at revision %d", got)
	}
}

// Another replica's change may lie between the lost answer and the question.
func TestLostAnswerWithLaterChanges(t *testing.T) {
	s, kv, cfg := hookedStore(t)
	other := cfg
	other.Client = sharedClient(t)
	second := run(t, other)
	for _, didCommit := range []bool{true, false} {
		var committed int64
		kv.onWrite(func(_ context.Context, send sender) (*clientv3.TxnResponse, error) {
			if didCommit {
				resp, err := send()
				if err != nil {
					return nil, err
				}
				committed = resp.Header.Revision
			}
			mustApply(t, second, pool("other", "10.0.0.1:443"))
			mustDelete(t, second, ref("BackendPool", "other"))
			return nil, context.DeadlineExceeded
		})
		resp, err := s.Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: []*resealv1.Resource{pool("a", "10.0.0.1:443")}})
		kv.onWrite(nil)
		if didCommit && (err != nil || resp.Revision != committed) {
			t.Errorf("committed at %d: got %d, %v", committed, resp.GetRevision(), err)
		}
		if !didCommit && !errors.Is(err, ErrUnavailable) {
			t.Errorf("not committed: got %v", err)
		}
		if got := s.Snapshot().Get("BackendPool", "a") != nil; got != didCommit {
			waitFor(t, "the state", func() bool { return (s.Snapshot().Get("BackendPool", "a") != nil) == didCommit })
		}
		if didCommit {
			mustDelete(t, s, ref("BackendPool", "a"))
		}
	}
}

// So many changes may follow that the record of a change is gone before its
// outcome is asked for. Then the only truthful answer is that it is not known.
func TestLostAnswerBeyondTheHistory(t *testing.T) {
	cfg, _ := testConfig(t)
	cfg.HistoryLimit = 2
	second := run(t, cfg)
	kv := &hookedKV{KV: cfg.Client.KV}
	hooked := cfg
	hooked.Client = sharedClient(t)
	kv.KV = hooked.Client.KV
	hooked.Client.KV = kv
	s := run(t, hooked)
	kv.onWrite(func(_ context.Context, send sender) (*clientv3.TxnResponse, error) {
		_, err := send()
		for _, name := range []string{"x", "y", "z"} {
			mustApply(t, second, pool(name, "10.0.0.1:443"))
		}
		return nil, errors.Join(context.DeadlineExceeded, err)
	})
	defer kv.onWrite(nil)
	_, err := s.Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: []*resealv1.Resource{pool("a", "10.0.0.1:443")}})
	if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "not known") {
		t.Errorf("got %v", err)
	}
}

func TestChangeSentTwice(t *testing.T) {
	s, kv, _ := hookedStore(t)
	var first int64
	kv.onWrite(func(_ context.Context, send sender) (*clientv3.TxnResponse, error) {
		resp, err := send()
		if err != nil {
			return nil, err
		}
		first = resp.Header.Revision
		return send()
	})
	defer kv.onWrite(nil)
	resp, err := s.Apply(t.Context(), "tester", &resealv1.ApplyRequest{
		ExpectedRevision: s.Snapshot().Revision(), Resources: []*resealv1.Resource{pool("a", "10.0.0.1:443")},
	})
	if err != nil || resp.Revision != first || len(resp.Changes) != 1 || resp.Changes[0].Action != resealv1.Change_ACTION_CREATED {
		t.Errorf("got %v, %v; want revision %d", resp, err, first)
	}
}

// The caller's deadline may be over when the answer is found.
func TestCallersDeadlineDuringACommittedChange(t *testing.T) {
	s, kv, _ := hookedStore(t)
	ctx, cancel := context.WithCancel(t.Context())
	kv.onWrite(func(_ context.Context, send sender) (*clientv3.TxnResponse, error) {
		_, err := send()
		cancel()
		return nil, errors.Join(context.Canceled, err)
	})
	defer kv.onWrite(nil)
	if _, err := s.Apply(ctx, "tester", &resealv1.ApplyRequest{Resources: []*resealv1.Resource{pool("a", "10.0.0.1:443")}}); err != nil {
		t.Errorf("a change that was made: %v", err)
	}
}

func TestRefusedChange(t *testing.T) {
	s, kv, cfg := hookedStore(t)
	fence := dump(t, cfg)[cfg.Prefix+"fence"]
	for refused, want := range map[error]error{
		rpctypes.ErrNoSpace: ErrFull, rpctypes.ErrPermissionDenied: ErrUnavailable, rpctypes.ErrTooManyRequests: ErrUnavailable,
	} {
		kv.onWrite(func(context.Context, sender) (*clientv3.TxnResponse, error) { return nil, refused })
		_, err := s.Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: []*resealv1.Resource{pool("a", "10.0.0.1:443")}})
		kv.onWrite(nil)
		if !errors.Is(err, want) || !strings.Contains(err.Error(), refused.Error()) {
			t.Errorf("%v: got %v", refused, err)
		}
	}
	if got := dump(t, cfg)[cfg.Prefix+"fence"]; got != fence {
		t.Error("a refusal was looked into although it is an answer")
	}
	kv.onWrite(func(context.Context, sender) (*clientv3.TxnResponse, error) {
		return nil, status.Error(codes.ResourceExhausted, "trying to send message larger than max")
	})
	defer kv.onWrite(nil)
	if _, err := s.Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: []*resealv1.Resource{pool("a", "10.0.0.1:443")}}); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too large for gRPC: %v", err)
	}
}

func TestAlwaysTooLate(t *testing.T) {
	t.Parallel()
	s, kv, cfg := hookedStore(t)
	rival := sharedClient(t)
	rounds := 0
	kv.onWrite(func(_ context.Context, send sender) (*clientv3.TxnResponse, error) {
		rounds++
		head := dump(t, cfg)[cfg.Prefix+"head"]
		if _, err := rival.Put(context.Background(), cfg.Prefix+"head", head); err != nil {
			return nil, err
		}
		return send()
	})
	defer kv.onWrite(nil)
	_, err := s.Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: []*resealv1.Resource{pool("a", "10.0.0.1:443")}})
	if !errors.Is(err, ErrUnavailable) || rounds != maxAttempts {
		t.Errorf("%v after %d rounds", err, rounds)
	}
}
