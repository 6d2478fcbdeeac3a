package main

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const backupLong = `Write all that the control plane keeps into a file: resources and their history, the
certificate authority, enrolments, ticket keys and orders for edges, as of one moment.

The file is sealed with the control plane's key-encryption key (--kek-file), which is
not in it: keep both, in different places. "reseal-controlplane restore FILE" reads
it into an empty store; edges then come back by themselves.`

func newBackupCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "backup FILE",
		Short:   "Write all that the control plane keeps into a sealed file",
		Long:    backupLong,
		Example: "  resealctl backup reseal-$(date +%F).backup",
		Args:    cobra.ExactArgs(1),
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		client, err := a.connect()
		if err != nil {
			return err
		}
		keys, size, err := client.backup(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		a.printf("%s holds %d keys in %s\n", args[0], keys, bytesText(size))
		return nil
	}
	return cmd
}

// backup writes a file, whole or not at all, that only this user can read.
func (c *client) backup(ctx context.Context, path string) (keys, size int64, err error) {
	temp, err := os.CreateTemp(filepath.Dir(path), ".backup-*") // mode 0600
	if err != nil {
		return 0, 0, err
	}
	defer os.Remove(temp.Name())
	keys, size, err = c.receiveBackup(ctx, temp)
	if err == nil {
		err = temp.Sync()
	}
	if err = errors.Join(err, temp.Close()); err != nil {
		return 0, 0, err
	}
	return keys, size, os.Rename(temp.Name(), path)
}

func (c *client) receiveBackup(ctx context.Context, w io.Writer) (keys, size int64, err error) {
	stream, err := resealv1.NewBackupServiceClient(c.conn).Backup(ctx, &resealv1.BackupRequest{})
	if err != nil {
		return 0, 0, err
	}
	for {
		piece, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF) && keys == 0:
			return 0, 0, errors.New("the control plane ended the backup early")
		case errors.Is(err, io.EOF):
			return keys, size, nil
		case err != nil:
			return 0, 0, err
		}
		n, err := w.Write(piece.GetData())
		if err != nil {
			return 0, 0, err
		}
		keys, size = piece.GetKeys(), size+int64(n)
	}
}
