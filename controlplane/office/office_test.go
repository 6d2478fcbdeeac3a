package office

import (
	"context"
	"log/slog"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/reseal/reseal/controlplane/etcd/etcdtest"
)

// TestOrderlyStop: the next leader begins at once, long before the lease would end, and
// what the first one still writes does not get through.
func TestOrderlyStop(t *testing.T) {
	client := etcdtest.New(t)
	config := Config{
		Client: client, Key: "/office", TTL: time.Minute, RequestTimeout: 5 * time.Second, Logger: slog.New(slog.DiscardHandler),
	}
	type term struct {
		name  string
		fence Fence
	}
	terms := make(chan term, 2)
	stand := func(name string) (stop func()) {
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			own := config
			own.Name = name
			Stand(ctx, own, func(ctx context.Context, fence Fence) error {
				terms <- term{name, fence}
				<-ctx.Done()
				return ctx.Err()
			})
		}()
		return func() { cancel(); <-ended }
	}
	guarded := func(fence Fence) bool {
		answer, err := client.Txn(t.Context()).If(fence.Guard("/office")).Then(clientv3.OpPut("/work", "x")).Commit()
		if err != nil {
			t.Fatal(err)
		}
		return answer.Succeeded
	}
	if !guarded(Fence{Key: "/office"}) {
		t.Error("a command can't write while there is no leader")
	}
	stopFirst := stand("first")
	first := <-terms
	stopSecond := stand("second")
	if !guarded(first.fence) {
		t.Error("the leader can't write")
	}
	if guarded(Fence{Key: "/office"}) {
		t.Error("who thinks that there is no leader can write")
	}
	begun := time.Now()
	stopFirst()
	select {
	case second := <-terms:
		if second.name != "second" || guarded(first.fence) || !guarded(second.fence) {
			t.Errorf("%s leads, with %+v after %+v", second.name, second.fence, first.fence)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("nobody leads")
	}
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("the next leader begins after %s", took)
	}
	stopSecond()
	if answer, err := client.Get(t.Context(), "/office/", clientv3.WithPrefix()); err != nil || len(answer.Kvs) > 0 {
		t.Errorf("candidates are left: %v, %v", answer, err)
	}
}
