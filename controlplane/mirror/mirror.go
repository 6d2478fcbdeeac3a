// Package mirror follows a part of etcd for those who keep it in memory. Packages
// of the control plane share it; it knows nothing of them.
package mirror

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// pageSize bounds the keys of one answer while loading.
	pageSize = 500
	// reloadInterval is how often everything is read anew: a watch that reconnects
	// to a restored etcd waits for a revision that is far off and says nothing.
	reloadInterval = 30 * time.Second

	firstPause = 100 * time.Millisecond
	mostPause  = 3 * time.Second
)

// Config says what is followed. Load and Take are called by Follow alone, one at a
// time, in the order of etcd's revisions.
type Config struct {
	// Client is connected to etcd. Required.
	Client *clientv3.Client
	// Prefix is what the followed keys begin with. They are one range, so that the
	// events of all come in the order of revisions. Required.
	Prefix string
	// Load replaces what is known by all there is. Required.
	Load func(Contents)
	// Take brings what changed since, at least one event. Required.
	Take func([]*clientv3.Event)
	// RequestTimeout bounds one request of a load. Required.
	RequestTimeout time.Duration
	// Reload is how often everything is loaded anew. Default 30 s.
	Reload time.Duration
	// Logger is for the operator of this process; what it is told names Subject.
	// Required, as is Subject.
	Logger  *slog.Logger
	Subject string
}

// Contents are all followed keys at one revision of etcd.
type Contents struct {
	Keys     []*mvccpb.KeyValue
	Revision int64
	// Cluster is the id of the etcd cluster.
	Cluster uint64
	// Gap says that what happened before may have been missed for longer than a
	// load takes: it is the first one, or followed on an error.
	Gap bool
}

// Follow loads and follows until ctx ends. Trouble with etcd is logged and tried
// again, with pauses of up to 3 s and jitter, so that replicas don't move in step;
// what is known stands meanwhile.
func Follow(ctx context.Context, config Config) {
	if config.Reload <= 0 {
		config.Reload = reloadInterval
	}
	pause, gap := firstPause, true
	for ctx.Err() == nil {
		err := pass(ctx, config, gap)
		if gap = err != nil; !gap || ctx.Err() != nil {
			pause = firstPause
			continue
		}
		config.Logger.Warn("lost track of "+config.Subject+" in etcd, loading again", "error", err)
		timer := time.NewTimer(pause/2 + rand.N(pause/2+1))
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
		timer.Stop()
		pause = min(2*pause, mostPause)
	}
}

// pass loads everything and follows the watch for some time.
func pass(ctx context.Context, config Config, gap bool) error {
	found, err := load(ctx, config)
	if err != nil {
		return err
	}
	found.Gap = gap
	config.Load(found)
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	answers := config.Client.Watch(ctx, config.Prefix, clientv3.WithPrefix(), clientv3.WithRev(found.Revision+1))
	reload := time.NewTimer(config.Reload)
	defer reload.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-reload.C:
			return nil
		case answer, ok := <-answers:
			if !ok {
				return errors.New("the watch ended")
			}
			if err := answer.Err(); err != nil {
				return fmt.Errorf("watch: %w", err)
			}
			if len(answer.Events) > 0 {
				config.Take(answer.Events)
			}
		}
	}
}

// load reads everything at one revision.
func load(ctx context.Context, config Config) (Contents, error) {
	var found Contents
	from, end := config.Prefix, clientv3.GetPrefixRangeEnd(config.Prefix)
	for more := true; more; {
		bounded, cancel := context.WithTimeout(ctx, config.RequestTimeout)
		answer, err := config.Client.Get(bounded, from, clientv3.WithRange(end), clientv3.WithLimit(pageSize), clientv3.WithRev(found.Revision))
		cancel()
		if err != nil {
			return Contents{}, fmt.Errorf("read %s: %w", config.Subject, err)
		}
		if found.Revision == 0 {
			found.Revision, found.Cluster = answer.Header.Revision, answer.Header.ClusterId
		}
		found.Keys = append(found.Keys, answer.Kvs...)
		if more = answer.More && len(answer.Kvs) > 0; more {
			from = string(answer.Kvs[len(answer.Kvs)-1].Key) + "\x00"
		}
	}
	return found, nil
}
