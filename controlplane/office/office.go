// Package office elects, in etcd, the replica that does what only one may do, and
// fences its writes. Packages of the control plane share it; it knows nothing of them.
//
// Candidates are keys below the office's, on a lease each; the oldest leads. Each write
// of a leader names its key, so that one that was paused can't write after another has
// taken over. One that stops in order resigns: the next begins at once.
package office

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

const (
	// goodbye bounds how long a replica that stops tries to give up its office.
	goodbye = 2 * time.Second

	// Pauses before a replica stands for election anew.
	firstPause = 100 * time.Millisecond
	mostPause  = 3 * time.Second
)

// ErrDeposed means that this replica is not the leader any more.
var ErrDeposed = errors.New("this replica is not the leader any more")

// Config says what the office is, and who stands for it.
type Config struct {
	// Client is the connection to etcd. Required. It is not closed.
	Client *clientv3.Client
	// Key is that of the office. Candidates are keys below it, with "/". Required.
	Key string
	// Name is how others see this replica. Required.
	Name string
	// TTL is how long a leader that does not answer keeps its office, in whole seconds.
	// Required.
	TTL time.Duration
	// RequestTimeout bounds one request. Required.
	RequestTimeout time.Duration
	// Logger is for the operator of this process. Required.
	Logger *slog.Logger
}

// Fence is what lets a leader's writes through as long as it leads.
type Fence struct {
	// Key is the leader's, or any that does not exist while there is none.
	Key string
	// Created is its create revision. 0: there is no leader.
	Created int64
}

// Guard is true in a transaction while the leader is the one that it was, or there is
// still none.
func (f Fence) Guard(office string) clientv3.Cmp {
	if f.Created == 0 {
		// What does not exist compares like a key of revision 0.
		return clientv3.Compare(clientv3.CreateRevision(office+"/"), "<", 1).WithPrefix()
	}
	return clientv3.Compare(clientv3.CreateRevision(f.Key), "=", f.Created)
}

// Lost tells from what is found under Key whether the leader is another one by now.
func (f Fence) Lost(found []*mvccpb.KeyValue) bool {
	return f.Created > 0 && (len(found) == 0 || found[0].CreateRevision != f.Created)
}

// Stand stands for election, and calls lead while this replica leads, until ctx ends.
// The context of lead ends when the office is lost; lead returns ErrDeposed when a write
// tells it so. It stands again then.
func Stand(ctx context.Context, config Config, lead func(context.Context, Fence) error) {
	for pause := firstPause; ctx.Err() == nil; {
		begun := time.Now()
		err := term(ctx, config, lead)
		if ctx.Err() != nil {
			return
		}
		if time.Since(begun) > time.Minute {
			pause = firstPause
		}
		config.Logger.Warn("this replica stands for election anew", "error", err)
		timer := time.NewTimer(pause/2 + rand.N(pause/2+1))
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
		pause = min(2*pause, mostPause)
	}
}

// term is one candidacy: it waits for the office, leads, and returns when its lease is
// lost or ctx ends.
func term(ctx context.Context, config Config, lead func(context.Context, Fence) error) error {
	grant, cancel := context.WithTimeout(ctx, config.RequestTimeout)
	lease, err := config.Client.Grant(grant, int64(config.TTL/time.Second))
	cancel()
	if err != nil {
		return fmt.Errorf("lease: %w", err)
	}
	// What gives up the office must outlive ctx, but not by much.
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	defer context.AfterFunc(ctx, func() {
		timer := time.NewTimer(goodbye)
		defer timer.Stop()
		select {
		case <-timer.C:
			end()
		case <-life.Done():
		}
	})()
	session, err := concurrency.NewSession(bounded(life, config.Client), concurrency.WithLease(lease.ID), concurrency.WithContext(life))
	if err != nil {
		return fmt.Errorf("session: %w", err)
	}
	defer func() {
		session.Orphan()
		bye, cancel := context.WithTimeout(life, goodbye)
		defer cancel()
		if _, err := config.Client.Revoke(bye, lease.ID); err != nil {
			config.Logger.Debug("the leader's lease ends by itself", "error", err)
		}
	}()
	// A candidate whose lease is gone would wait for ever.
	standing, stop := context.WithCancel(ctx)
	defer stop()
	defer context.AfterFunc(session.Ctx(), stop)()
	election := concurrency.NewElection(session, config.Key)
	if err := election.Campaign(standing, config.Name); err != nil {
		return fmt.Errorf("campaign: %w", err)
	}
	return lead(standing, Fence{Key: election.Key(), Created: election.Rev()})
}

// bounded is the client, except that its own context is ctx: the election uses it to
// withdraw, and must not do so for ever.
func bounded(ctx context.Context, client *clientv3.Client) *clientv3.Client {
	made := clientv3.NewCtxClient(ctx)
	made.KV, made.Lease, made.Watcher = client.KV, client.Lease, client.Watcher
	return made
}
