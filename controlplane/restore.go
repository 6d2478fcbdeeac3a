package controlplane

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/reseal/reseal/controlplane/backup"
	"github.com/reseal/reseal/controlplane/etcd"
	"github.com/reseal/reseal/controlplane/trust"
)

// prefix is what all keys of a control plane begin with.
const prefix = "/reseal/v1/"

// Restore writes the backup in file into the store that cfg names, which must be
// empty, and says on out what it did. The key-encryption key must be the one that the
// backup was sealed with. An embedded store must not be in use.
func Restore(ctx context.Context, cfg Config, file string, out io.Writer) error {
	c := New(cfg)
	from, err := os.Open(file)
	if err != nil {
		return err
	}
	defer from.Close()
	key, err := trust.OpenKEK(c.cfg.KEKFile)
	if err != nil {
		return fmt.Errorf("%w; a backup is sealed with the --kek-file of the control plane that made it", err)
	}
	if err := os.MkdirAll(c.cfg.DataDir, 0o700); err != nil {
		return fmt.Errorf("data directory: %w", err)
	}
	unlock, err := lockDir(c.cfg.DataDir)
	if err != nil {
		return fmt.Errorf("%w; stop it first", err)
	}
	defer unlock()
	kept, err := etcd.Open(ctx, c.etcdConfig())
	if err != nil {
		return err
	}
	defer kept.Close()
	keys, err := backup.Restore(ctx, kept.Client, prefix, key, backup.Limits{Ops: kept.MaxOps, Bytes: kept.MaxBytes}, from)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	fmt.Fprintf(out, "restored %d keys; start the control planes with the same --kek-file and --trust-domain\n", keys)
	return nil
}

// checkRestored refuses a store into which only a part of a backup was restored. It
// waits for the store.
func (c *ControlPlane) checkRestored(ctx context.Context, kept *etcd.Store) error {
	for {
		bounded, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := backup.Check(bounded, kept.Client, prefix)
		cancel()
		if err == nil || errors.Is(err, backup.ErrUnfinished) || ctx.Err() != nil {
			return err
		}
		c.cfg.Logger.Warn("the store does not answer, trying again", "error", err)
		pause, cancel := context.WithTimeout(ctx, time.Second)
		<-pause.Done()
		cancel()
	}
}
