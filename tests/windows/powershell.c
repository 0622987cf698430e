/* A stand-in for powershell.exe: answers the three scripts of the agent's Hyper-V part from files beside it, and records what was asked.
 * STANDIN_PS  directory: vms.json is the list; log gets a line for each call; a file `refuse` makes Checkpoint-VM fail. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(int count, char **arguments)
{
    const char *dir = getenv("STANDIN_PS"), *script = count ? arguments[count - 1] : "";
    char path[600], buffer[4096];
    size_t len;
    FILE *log, *file;
    snprintf(path, sizeof path, "%s/log", dir);
    log = fopen(path, "a");
    if (strstr(script, "Checkpoint-VM")) {
        fprintf(log, "make %s %s\n", getenv("STILLPOINT_VM"), getenv("STILLPOINT_CHECKPOINT"));
        fclose(log);
        snprintf(path, sizeof path, "%s/refuse", dir);
        if ((file = fopen(path, "r"))) { fclose(file); fprintf(stderr, "Checkpoint-VM : Not enough memory in the system\n"); return 1; }
        puts("{\"id\":\"c1\"}");
        return 0;
    }
    if (strstr(script, "Remove-VMSnapshot")) {
        fprintf(log, "remove %s %s\n", getenv("STILLPOINT_VM"), getenv("STILLPOINT_CHECKPOINT"));
        fclose(log);
        puts("{\"gone\":true}");
        return 0;
    }
    fprintf(log, "list\n");
    fclose(log);
    snprintf(path, sizeof path, "%s/vms.json", dir);
    if (!(file = fopen(path, "r"))) { fprintf(stderr, "Get-VM : no Hyper-V here\n"); return 1; }
    while ((len = fread(buffer, 1, sizeof buffer, file))) fwrite(buffer, 1, len, stdout);
    fclose(file);
    return 0;
}
